"""Compute the losses of GRPO, PPO and distillation. Pure functions, without engine or ranks.

Sources: GRPO, DeepSeekMath arXiv 2402.03300 eq. 3 and 4; DAPO arXiv 2503.14476 (clip-higher, token-level
loss, overlong filtering); Dr. GRPO arXiv 2503.20783 (no sigma, constant denominator); PPO arXiv 1707.06347
eq. 7; GAE arXiv 1506.02438 eq. 16; k3: Schulman, "Approximating KL Divergence"; RLOO arXiv 2402.14740; CISPO
arXiv 2506.13585 eq. 4; GSPO arXiv 2507.18071 eq. 5 to 7; dual clip arXiv 1912.09729; on-policy distillation:
GKD, arXiv 2306.13649.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.config.schema.rl import RlConfig

Floats = npt.NDArray[np.float64]
_EPS = 1e-6


def group_advantages(rewards: Floats, scale: bool, leave_one_out: bool = False) -> Floats:
    """Return (groups, members) advantages: r - mean, divided by the group's standard deviation if `scale`.

    With `leave_one_out` the mean is that of the other members (RLOO, 2402.14740 section 2.2). Scaled, they
    are GRPO's (2402.03300, section 4.1.2); unscaled, Dr. GRPO's (2503.20783), for which dividing gives more
    weight to questions that are almost always or almost never solved. A group with equal rewards has
    advantage exactly 0: it gives no gradient.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    members = rewards.shape[1]
    if leave_one_out and members > 1:
        centred *= members / (members - 1)
    spread = rewards.std(1, keepdims=True)
    # Equal rewards can differ from their mean by rounding; divided by _EPS that would be an advantage.
    alike = np.ptp(rewards, axis=1, keepdims=True) <= _EPS
    return np.where(alike, 0.0, centred / (spread + _EPS) if scale else centred)


def gae(
    rewards: Floats, values: Floats, lengths: npt.NDArray[np.int32], gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """Return (advantages, returns) per token of completions (n, longest); 0 beyond each one's length.

    delta_t = r_t + gamma V_t+1 - V_t and A_t = delta_t + gamma lambda A_t+1 (1506.02438, eq. 16 as a
    recursion). The critic's targets are the returns A_t + V_t. After the last token V and A are 0, also for a
    truncated completion.

    Args:
        rewards: (n,), given at the last token.
        values: (n, longest), the critic's estimate before each token.
    """
    n, longest = values.shape
    advantages = np.zeros((n, longest))
    running, after = np.zeros(n), np.zeros(n)  # A and V of the token after t
    for t in range(longest - 1, -1, -1):
        is_last, inside = t == lengths - 1, t < lengths
        delta = np.where(is_last, rewards, 0.0) + gamma * np.where(is_last, 0.0, after) - values[:, t]
        running = np.where(inside, delta + gamma * lam * np.where(is_last, 0.0, running), 0.0)
        after = values[:, t]
        advantages[:, t] = running
    inside = np.arange(longest)[None, :] < lengths[:, None]
    return advantages, np.where(inside, advantages + values, 0.0)


def whiten(values: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Scale to mean 0 and standard deviation 1 over the masked entries; 0 elsewhere. It covers the whole
    rollout, not a micro batch, so it does not depend on how rows are dealt to ranks."""
    inside = values[mask]
    return np.where(mask, (values - inside.mean()) / (inside.std() + 1e-8), 0.0)


def token_weights(
    lengths: npt.NDArray[np.int32], counts: npt.NDArray[np.bool_], level: str, max_completion_length: int
) -> Floats:
    """Return (n,): the weight of each token of a completion, so that the weighted sum is the mean wanted.

    Over N completions that count (`counts`, (n,)), of L_i tokens each, a token of completion i weighs

        sequence    1 / (N L_i)      GRPO, 2402.03300 eq. 3: each completion's mean, then their mean
        token       1 / sum_j L_j    DAPO, 2503.14476 section 3.3: long completions weigh as their tokens do
        constant    1 / (N L_max)    Dr. GRPO, 2503.20783: no length in it, so no reason to be long when wrong
    """
    kept = np.where(counts, lengths, 0)
    if level == "token":
        return np.where(counts, 1.0 / max(1, kept.sum()), 0.0)
    if level == "sequence":
        return np.where(counts, 1.0 / (max(1, counts.sum()) * np.maximum(1, lengths)), 0.0)
    return np.where(counts, 1.0 / (max(1, counts.sum()) * max_completion_length), 0.0)


@dataclass(frozen=True)
class Terms:
    """Sums over the tokens of a micro batch."""

    loss: torch.Tensor
    """Weighted; the part that is differentiated."""
    clipped: torch.Tensor
    kl: torch.Tensor
    """k3 estimate of KL(policy, reference), unweighted; 0 without a reference."""


def policy_terms(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    config: RlConfig,
    reference: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> Terms:
    """Return the clipped surrogate loss of a micro batch. All inputs (rows, longest); `weights` 0 on padding.

    loss = -sum(w * gain) + kl_coef * sum(w * k3), with the KL inside the loss as in GRPO, 2402.03300 eq. 3,
    and not inside the reward. The gain of rl.objective=clip is min(rho A, clip(rho, 1 - clip_low, 1 +
    clip_high) A): PPO, 1707.06347 eq. 7, two bounds after DAPO's clip-higher, 2503.14476 section 3.1; of
    cispo it is min(rho, 1 + clip_high) A log pi, with no gradient through the ratio. rho is pi / pi_old of
    the token, or for a sequence the geometric mean over its tokens (GSPO, 2507.18071 eq. 7).
    rl.kl_gradient=corrected multiplies k3 by the token's ratio, see `kl_k3`. `importance` weighs the gain,
    not the KL.
    """
    # Mask before the exponential: values on padding could overflow, and infinity x 0 is nan.
    difference = token_difference = torch.where(mask, logprobs - old, 0.0)
    if config.ratio == "sequence":
        difference = (difference.sum(1) / mask.sum(1).clamp_min(1))[:, None].expand_as(difference)
    ratio = torch.exp(difference)
    if config.objective == "cispo":
        bounded = ratio.detach().clamp_max(1 + config.clip_high)
        gain = bounded * advantages * torch.where(mask, logprobs, 0.0)
        clipped = ((ratio > bounded) & mask).sum()
    else:
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(ratio * advantages, bounded * advantages)
        # True where clipping reduced the gain: only there the gradient is 0. A ratio beyond the bound on the
        # other side of the advantage's sign still gives a gradient.
        clipped = ((ratio * advantages > bounded * advantages) & mask).sum()
        if config.dual_clip is not None:
            gain = torch.where(advantages < 0, gain.maximum(config.dual_clip * advantages), gain)
    if importance is not None:
        gain = gain * importance
    loss = -(gain * weights).sum()
    kl = torch.zeros((), device=logprobs.device)
    if reference is not None:
        k3 = kl_k3(torch.where(mask, logprobs, 0.0), torch.where(mask, reference, 0.0))
        kl = (k3 * mask).sum().detach()
        if config.kl_gradient == "corrected":
            k3 = k3 * torch.exp(token_difference)
        loss = loss + config.kl_coef * (k3 * weights).sum()
    return Terms(loss, clipped, kl)


def importance_weights(
    trainer: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """Return (rows, longest): min(pi_trainer / pi_sampler, cap) per token, without a gradient; 0 on padding.

    Both probabilities are by the policy that sampled. Other kernels, or another precision than the trainer's,
    sample from another distribution. The weight corrects that, and the cap bounds its variance (truncated
    importance sampling: Ionides 2008; for RL, Yao et al. 2025, fengyao.notion.site/off-policy-rl, whose ratio
    inside the clip is of the trainer's own two policies).
    """
    ratio = torch.exp(torch.where(mask, trainer.detach() - sampler, -torch.inf))
    return ratio.clamp_max(cap)


def kl_k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return exp(d) - d - 1 with d = log reference - log policy, per token sampled from the policy.

    The value is an unbiased estimate of KL(policy, reference), never negative, and of less variance than -d
    (Schulman, "Approximating KL Divergence", k3). The gradient is biased: over samples of the policy its mean
    is the gradient of KL(reference, policy). Multiplied by pi / pi_old, with a gradient through that ratio,
    value and gradient are those of KL(policy, reference), also for samples of pi_old (DeepSeek-V3.2, arXiv
    2512.02556).
    """
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Return (n,) divergences in nats between two distributions given as (n, vocab) logits.

    beta KL(P, M) + (1 - beta) KL(Q, M) with P the teacher, Q the student, M = beta P + (1 - beta) Q: the
    generalised Jensen-Shannon divergence of GKD, 2306.13649, section 2. Towards 0 and 1 it vanishes, and its
    gradient becomes that of beta KL(P, Q) and of (1 - beta) KL(Q, P); at 0 and 1 it is KL(P, Q), the forward,
    and KL(Q, P), the reverse KL, themselves.

    Entries that only the larger vocabulary has are padding of its embedding, and ignored.
    """
    shared = min(student.shape[-1], teacher.shape[-1])
    q, p = student[..., :shared].log_softmax(-1), teacher[..., :shared].log_softmax(-1)
    if beta in (0, 1):
        return _kl(q, p) if beta else _kl(p, q)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return the critic's clipped squared error, weighted and summed (PPO's reference implementation)."""
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    worst = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    return 0.5 * (worst * weights).sum()
