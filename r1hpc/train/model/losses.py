"""Compute log-probabilities of chosen tokens, and the losses made of them: GRPO, PPO, distillation.

The advantages, clipped losses, KL, GAE and divergence are pure functions, without engine or ranks. Sources:
GRPO, DeepSeekMath arXiv 2402.03300 eq. 3 and 4; DAPO arXiv 2503.14476 (clip-higher, token-level loss,
overlong filtering); Dr. GRPO arXiv 2503.20783 (no sigma, constant denominator); PPO arXiv 1707.06347 eq. 7;
GAE arXiv 1506.02438 eq. 16; k3: Schulman, "Approximating KL Divergence"; RLOO arXiv 2402.14740; CISPO arXiv
2506.13585 eq. 4; GSPO arXiv 2507.18071 eq. 5 to 7; dual clip arXiv 1912.09729; on-policy distillation: GKD,
arXiv 2306.13649.

`OutputHead` does not hold all logits at once. In fp32 the logits of 32,768 tokens over a vocabulary of
152,000 take 18.6 GiB, and a loss's backward pass holds three such tensors. So while the model runs, its
output head is replaced: it takes the hidden states of the chosen tokens, a chunk at a time, and returns three
numbers for each. The backward pass computes a chunk's logits again (activation checkpointing,
torch.utils.checkpoint): one more product with the head.

The head runs inside the model's forward pass, as a module: ZeRO 3 gathers its weights once for all chunks,
and its adapters count. Some families change the logits after the head (Gemma's cap, Cohere's and Granite's
scale). The first call finds out, and for them the logits stay complete.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from r1hpc.config.schema.rl import RlConfig
from r1hpc.plan.memory.step import logits_at_once

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

    - sum w gain + kl_coef sum w k3, with the KL inside the loss as in GRPO, 2402.03300 eq. 3, and not inside
    the reward. The gain of rl.objective=clip is min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): PPO,
    1707.06347 eq. 7, two bounds after DAPO's clip-higher, 2503.14476 section 3.1; of cispo it is
    min(rho, 1 + clip_high) A log pi, with no gradient through the ratio. rho is pi / pi_old of the token, or
    for a sequence the geometric mean over its tokens (GSPO, 2507.18071 eq. 7). rl.kl_gradient=corrected
    multiplies k3 by the token's ratio, see `kl_k3`. `importance_weights` are of the gain, not of the KL.
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
    (Schulman, "Approximating KL Divergence", k3). The gradient is not: for samples of the policy its mean is
    the gradient of KL(reference, policy). Times pi / pi_old, differentiated too, both are those of
    KL(policy, reference), also for samples of pi_old (DeepSeek-V3.2, arXiv 2512.02556).
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


Apply = Callable[[Tensor], Tensor]
"""Maps hidden states (n, hidden_size) to logits (n, vocab)."""


@dataclass(frozen=True)
class Scores:
    """Results for the chosen tokens, each (num_chosen,) in fp32."""

    logprobs: Tensor
    entropies: Tensor
    """In nats, of the distribution each target was drawn from; zeros if not requested."""
    divergences: Tensor
    """In nats, between that distribution and a teacher's; zeros without a teacher."""


@dataclass(frozen=True)
class Teacher:
    """The distribution a student's is compared with, token by token."""

    logits: Tensor
    """(num_chosen, its vocab), at least one row, from OutputHead.logits."""
    beta: float


class OutputHead:
    """The output head of a causal language model; under ZeRO 3 its weights are divided over the ranks."""

    def __init__(self, policy: Any, chunk_tokens: int | None) -> None:
        """`chunk_tokens` is train.logits_chunk_tokens; `policy` may be wrapped by peft."""
        self._head: nn.Module = policy.get_output_embeddings()
        self._chunk = logits_at_once(chunk_tokens, policy.config.get_text_config().vocab_size)
        self._is_last: bool | None = None
        """True if the model returns its head's output unchanged; None: not known yet."""

    def scores(
        self,
        run: Callable[[], Tensor],
        targets: Tensor,
        chosen: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropies: bool = False,
        differentiate_entropies: bool = False,
        teacher: Teacher | None = None,
    ) -> Scores:
        """Score the tokens of `targets` (rows, k) at the flat positions `chosen` (num_chosen,); None: all.

        Positions come from the host, not a mask: selecting by a mask makes the host wait for the GPU.

        Args:
            run: a forward pass of the model with logits (rows, k, vocab); returns them.
                Called once; the first time twice, for a family that changes its logits.
            temperature: the logits are divided by it, a teacher's too.
            differentiate_entropies: they are part of the loss.
            teacher: its logits of the same tokens, in the same order.
        """
        chosen, num_chosen = _some(targets, chosen)
        picked = targets.flatten() if chosen is None else targets.flatten()[chosen]
        given: list[Tensor] = []

        def score(apply: Apply, states: Tensor, wanted: Tensor, told: Tensor | None) -> Tensor:
            """Map (n, width), (n,) and a teacher's logits (n, vocab) to (n, 3), the columns of Scores."""
            logits = _tempered(apply(states), temperature)
            logprobs = -F.cross_entropy(logits, wanted, reduction="none")
            entropies = divergences = torch.zeros_like(logprobs)
            if with_entropies:
                entropies = _entropies(logits, differentiate_entropies)
            if teacher is not None and told is not None:
                divergences = divergence(logits, _tempered(told, temperature), teacher.beta)
            return torch.stack([logprobs, entropies, divergences], -1)

        def in_chunks(apply: Apply, hidden: Tensor) -> Tensor:
            """Return (num_chosen, 3), in place of the head's logits."""
            states = _picked(hidden, chosen)
            parts = torch.split(states, self._chunk)
            told = [None] * len(parts) if teacher is None else torch.split(teacher.logits, self._chunk)
            function: Callable[..., Tensor] = score
            if torch.is_grad_enabled() and len(states) > self._chunk:  # the backward pass computes them again
                function = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
            pieces = zip(parts, torch.split(picked, self._chunk), told, strict=True)
            answer = torch.cat([function(apply, *piece) for piece in pieces])
            given.append(answer.detach())
            return answer

        if self._is_last is not False:
            with _in_place_of_forward(self._head, in_chunks):
                answer = run()
            if self._is_last is None:
                self._is_last = answer.shape == given[0].shape and torch.equal(
                    answer.nan_to_num(), given[0].nan_to_num()
                )
            if self._is_last:
                return Scores(*answer[:num_chosen].unbind(-1))
        told = None if teacher is None else teacher.logits
        whole = score(lambda logits: logits, _picked(run(), chosen), picked, told)
        return Scores(*whole[:num_chosen].unbind(-1))

    def logits(self, run: Callable[[], Tensor], targets: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return (num_chosen, vocab), at least one row: the logits of the tokens `scores` would get, in the
        model's precision, with its family's changes after the head."""
        chosen, _ = _some(targets, chosen)
        with _in_place_of_forward(self._head, lambda apply, hidden: apply(_picked(hidden, chosen)[None])):
            return run()[0]


def _some(targets: Tensor, chosen: Tensor | None) -> tuple[Tensor | None, int]:
    """Return at least one position, and how many were requested. A rank without any takes part too: its
    head's weights need a gradient of 0, and the first call must find out about the model on every rank."""
    num = targets.numel() if chosen is None else len(chosen)
    if num:
        return chosen, num
    return torch.zeros(1, dtype=torch.int64, device=targets.device), 0


def _picked(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Map (rows, k, width) to (num_chosen, width)."""
    return values.flatten(0, 1) if chosen is None else values.flatten(0, 1)[chosen]


def _entropies(logits: Tensor, differentiate: bool) -> Tensor:
    # A function of its own, so that its (n, vocab) tensor is gone before the divergence makes more.
    with torch.set_grad_enabled(differentiate and torch.is_grad_enabled()):
        every = logits.log_softmax(-1)
        return -(every.exp() * every).sum(-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


@contextmanager
def _in_place_of_forward(module: nn.Module, function: Callable[[Apply, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module returns function(its own forward pass, its input); its hooks still run."""
    own, forward = module.__dict__.get("forward"), module.forward
    module.forward = partial(function, forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
