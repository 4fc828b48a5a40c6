"""Compute the losses of one update on a rollout's completions: GRPO, PPO or distillation from a teacher.

Read from `Updater.prepare` (advantages) to `Updater.losses` and `_loss`; the formulas are the functions at
the end, without engine or ranks. PPO's critic is in ppo.py.

Every rank knows the whole rollout, so all ranks deal the rows alike. Rows that give no gradient are left out,
the rest is sorted by length and dealt: a micro batch holds rows of similar length, and all ranks have equally
many.

Sources: GRPO, DeepSeekMath arXiv 2402.03300 eq. 3 and 4; DAPO arXiv 2503.14476 (clip-higher, token-level
loss, overlong filtering); Dr. GRPO arXiv 2503.20783 (no sigma, constant denominator); PPO arXiv 1707.06347
eq. 7; k3: Schulman, "Approximating KL Divergence"; RLOO arXiv 2402.14740; CISPO arXiv 2506.13585 eq. 4; GSPO
arXiv 2507.18071 eq. 5 to 7; dual clip arXiv 1912.09729.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.config.schema.rl import RlConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import corrects_importance, updates_per_rollout, works_out_old_policy
from r1hpc.train.model.output_head import OutputHead, Scores, Teacher
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rl.off_policy import corrected
from r1hpc.train.rl.ppo import gae, value_loss, whiten
from r1hpc.train.rl.rollout import Experience, Floats, MicroBatch, Rollout, Rows, Tally, deal, lay_out
from r1hpc.train.rollout.policy import Reference

_EPS = 1e-6


@dataclass(frozen=True)
class Forward:
    """Outputs of the networks for a micro batch, each (rows, k)."""

    logprobs: torch.Tensor
    """By the trained policy, of the targets. This and the next are 0 outside the completions."""
    entropies: torch.Tensor
    """In nats, of the trained policy; with a gradient if rl.entropy_coef needs it."""
    values: torch.Tensor | None
    """By the critic; PPO only."""
    reference: torch.Tensor | None
    """Log-probabilities by the reference, if there is a KL term."""
    divergences: torch.Tensor
    """Divergence to the teacher; 0 without one."""

    def nothing(self) -> torch.Tensor:
        """Return a loss of 0 that reaches every parameter."""
        return (self.logprobs * 0).sum() + (0 if self.values is None else (self.values * 0).sum())


class Updater:
    """Computes the losses of one run. Every method takes the training engine; all ranks call it."""

    def __init__(
        self, config: RunConfig, group: Group, pad: int, policy: Any, reference: Reference | None
    ) -> None:
        """`policy` is the language model inside the engine."""
        self._config = config
        self._group = group
        self._pad = pad
        self._reference = reference
        self._is_ppo = config.rl.algorithm == "ppo"
        self._distills = config.rl.algorithm == "distill"
        self.corrects_importance = corrects_importance(config)
        self.has_mask = config.rl.importance_mask != "none"
        self.has_staleness = config.rl.max_staleness > 0
        self.num_updates = updates_per_rollout(config)
        self._works_out_old_policy = works_out_old_policy(config)
        self._head = OutputHead(policy, config.train.logits_chunk_tokens)
        self._reference_head = self._head
        if reference is not None and reference.model is not policy:
            self._reference_head = OutputHead(reference.model, config.train.logits_chunk_tokens)

    def prepare(self, engine: Any, rollout: Rollout, prompts: Sequence[tuple[int, ...]]) -> Experience:
        """Return a rollout with its advantages, and with what the networks give before its updates: the
        critic's values under PPO, and the old log-probabilities if the sampler's will not do. Collective."""
        rl, groups = self._config.rl, rollout.groups
        longest = groups.tokens.shape[1]
        # Overlong filtering (DAPO, arXiv 2503.14476, section 3.4): a truncated completion does not tell how
        # its reasoning would have ended.
        counts = groups.ended if rl.mask_truncated else np.ones(len(groups.lengths), np.bool_)
        inside = np.arange(longest)[None, :] < groups.lengths[:, None]
        is_stale = rollout.staleness() > 0 if rl.max_staleness else None
        bare = Experience(groups, tuple(prompts), np.zeros(inside.shape), counts, is_stale=is_stale)
        old_logprobs = rollout.old_logprobs
        if old_logprobs is None and self._works_out_old_policy:
            old_logprobs = self._worked_out(engine, bare, self._logprobs)
        if self._distills:
            return bare
        if not self._is_ppo:
            # GRPO rewards a completion as a whole, so all its tokens share one advantage.
            advantages = group_advantages(
                groups.rewards.reshape(len(groups.items), -1),
                rl.scale_advantage,
                rl.baseline == "leave_one_out",
            ).ravel()
            spread = np.where(inside, advantages[:, None], 0.0)
            return replace(bare, advantages=spread, old_logprobs=old_logprobs)
        # After a resume between two updates the critic has changed since GAE used it: take the saved values.
        values = rollout.values
        if values is None:
            values = self._worked_out(engine, bare, lambda engine, b: _outputs(engine, b, of_policy=False)[1])
        advantages, returns = gae(groups.rewards, values, groups.lengths, rl.gamma, rl.gae_lambda)
        whitened = whiten(advantages, inside & counts[:, None])
        return Experience(groups, tuple(prompts), whitened, counts, returns, values, old_logprobs)

    def rows_of(self, experience: Experience, update: int) -> Rows:
        """Return the completions of update number `update` (from 0): complete groups, in order."""
        per_pass = self.num_updates // self._config.rl.num_iterations
        parts = np.array_split(np.arange(len(experience.groups.items)), per_pass)
        members = experience.groups.num_members
        chosen = parts[update % per_pass]
        return np.asarray((chosen[:, None] * members + np.arange(members)).ravel(), np.int64)

    def losses(
        self, engine: Any, experience: Experience, rows: Rows, is_first: bool, tally: Tally
    ) -> Iterator[torch.Tensor]:
        """Yield the loss of each micro batch of an update on `rows`, for optimizer_step; `tally` adds
        up.

        `is_first`: no update on the rollout has been made, so the trainer's policy is the old one, and the
        sampler's unless the rollout is stale.
        """
        rl, groups = self._config.rl, experience.groups
        # (n,): a token's weight in each completion. Rows left out of the computation count too: the
        # denominator must depend neither on the number of ranks nor on which rows give no gradient.
        weights, longest = np.zeros(len(groups.lengths)), self._config.rollout.max_completion_length
        weights[rows] = token_weights(groups.lengths[rows], experience.counts[rows], rl.loss_level, longest)
        teaches = weights[rows] > 0
        # Without KL and entropy only an advantage pulls at a row.
        if rl.skip_tied_groups and rl.algorithm == "grpo" and rl.kl_coef == 0 and rl.entropy_coef == 0:
            teaches &= np.abs(experience.advantages[rows]).max(1) > 0
        size = self._config.train.micro_batch_size
        micro_batches = deal(experience.total_lengths(), rows[teaches], self._group, size)
        for number, mine in enumerate(micro_batches):
            # The number of micro batches depends on the rollout, so DeepSpeed cannot count to the last.
            engine.set_gradient_accumulation_boundary(number + 1 == len(micro_batches))
            # A rank without rows must take part too: DeepSpeed reduces in the backward pass, and under ZeRO 3
            # every forward pass gathers parameters, also the reference's with adapters.
            batch = lay_out(experience, mine if len(mine) else rows[:1], self._pad, self._group.device)
            forward = self._forward(engine, batch)
            if not len(mine):
                yield forward.nothing()
                continue
            loss = self._loss(experience, batch, forward, weights[mine], is_first, tally)
            # DeepSpeed averages over the ranks, but the weights are made for a sum over them.
            yield loss * self._group.world_size

    def _loss(
        self,
        experience: Experience,
        batch: MicroBatch,
        forward: Forward,
        weights: Floats,
        is_first: bool,
        tally: Tally,
    ) -> torch.Tensor:
        """Return this micro batch's part of the loss: the policy's, the critic's and the entropy's."""
        rl, logprobs = self._config.rl, forward.logprobs
        sampled = batch.spread(experience.groups.logprobs)
        per_token = batch.mask * torch.from_numpy(weights).to(logprobs)[:, None]
        tally.add(tokens=batch.mask.sum(), entropy=forward.entropies.sum())
        if is_first:
            difference = (logprobs.detach() - sampled).abs() * batch.mask
            if experience.is_stale is not None:
                stale = batch.spread(experience.is_stale)
                tally.add(stale_tokens=stale.sum(), drift=(difference * stale).sum())
                difference = difference * (1 - stale)
            tally.add(difference=difference.sum())
        if self._distills:
            tally.add(kl=forward.divergences.sum())
            loss = (forward.divergences * per_token).sum()
        else:
            loss = self._policy_loss(experience, batch, forward, per_token, sampled, is_first, tally)
        if forward.values is not None and experience.values is not None and experience.returns is not None:
            old, targets = batch.spread(experience.values), batch.spread(experience.returns)
            critic = value_loss(forward.values.float(), old, targets, per_token, rl.value_clip)
            tally.add(value_loss=critic)
            loss = loss + rl.value_coef * critic
        if rl.entropy_coef:
            loss = loss - rl.entropy_coef * (forward.entropies * per_token).sum()
        return loss

    def _policy_loss(
        self,
        experience: Experience,
        batch: MicroBatch,
        forward: Forward,
        per_token: torch.Tensor,
        sampled: torch.Tensor,
        is_first: bool,
        tally: Tally,
    ) -> torch.Tensor:
        rl, logprobs = self._config.rl, forward.logprobs
        advantages = batch.spread(experience.advantages)
        # Experience has old log-probabilities if works_out_old_policy says so; otherwise the sampler's count.
        # In the first update the old policy is the policy: the ratio is 1, its gradient that of log pi. The
        # trainer's own values avoid the rounding of the sampler and of other micro batches.
        if is_first and (self.num_updates == 1 or experience.old_logprobs is not None):
            old = logprobs.detach()
        elif experience.old_logprobs is not None:
            old = batch.spread(experience.old_logprobs)
        else:
            old = sampled
        importance = None
        if self.corrects_importance:
            importance, left_out = corrected(rl, logprobs, old, sampled, advantages, batch.mask)
            tally.add(
                importance=importance.sum(),
                importance_squared=(importance**2).sum(),
                importance_capped=(importance >= rl.importance_cap).sum(),
                importance_left_out=left_out.sum(),
            )
        mask, reference = batch.mask, forward.reference
        terms = policy_terms(logprobs, old, advantages, per_token, mask, rl, reference, importance)
        tally.add(clipped=terms.clipped, kl=terms.kl)
        return terms.loss

    def _forward(self, engine: Any, batch: MicroBatch) -> Forward:
        """Run the policy, PPO's critic, and before them the reference or teacher."""
        rl, head, teacher, reference = self._config.rl, self._reference_head, None, None
        if self._reference is not None:
            network = self._reference.network
            with torch.no_grad(), self._reference.context():
                if self._distills:
                    logits = head.logits(lambda: _outputs(network, batch)[0], batch.targets, batch.positions)
                    teacher = Teacher(logits, rl.jsd_beta)
                else:
                    scores = self._scores(head, batch, lambda: _outputs(network, batch)[0])
                    reference = batch.placed(scores.logprobs)
        values: list[torch.Tensor | None] = []

        def run_policy() -> torch.Tensor:
            logits: torch.Tensor
            logits, found = _outputs(engine, batch)
            values[:] = [found]
            return logits

        wanted = {"with_entropies": True, "differentiate_entropies": rl.entropy_coef > 0}
        scores = self._scores(self._head, batch, run_policy, teacher=teacher, **wanted)
        logprobs, entropies = batch.placed(scores.logprobs), batch.placed(scores.entropies)
        return Forward(logprobs, entropies, values[0], reference, batch.placed(scores.divergences))

    def _scores(
        self, head: OutputHead, batch: MicroBatch, run: Callable[[], torch.Tensor], **more: Any
    ) -> Scores:
        more["temperature"] = self._config.rollout.temperature
        return head.scores(run, batch.targets, batch.positions, **more)

    def _logprobs(self, engine: Any, batch: MicroBatch) -> torch.Tensor:
        alone = {"of_critic": False} if self._is_ppo else {}
        scores = self._scores(self._head, batch, lambda: _outputs(engine, batch, **alone)[0])
        return batch.placed(scores.logprobs)

    @torch.no_grad()
    def _worked_out(
        self, engine: Any, experience: Experience, of: Callable[[Any, MicroBatch], torch.Tensor]
    ) -> Floats:
        """Return (n, longest): `of` each micro batch. Each rank computes its share, then the ranks sum up."""
        groups = experience.groups
        found = np.zeros(groups.tokens.shape)
        everything = np.arange(len(groups.lengths))
        size = self._config.train.micro_batch_size
        for mine in deal(experience.total_lengths(), everything, self._group, size):
            rows = mine if len(mine) else everything[:1]  # as in losses: every rank takes part
            batch = lay_out(experience, rows, self._pad, self._group.device)
            self._group.beat()
            values = of(engine, batch)
            if len(mine):
                found[mine] = batch.gathered(values, groups.tokens.shape[1])
        return self._group.sum_array(found)


def _outputs(network: Any, batch: MicroBatch, **more: bool) -> Any:
    """Return (logits, values) of the last positions; values are None without a critic."""
    out = network(input_ids=batch.input_ids, logits_to_keep=batch.num_kept, **more)
    return out if isinstance(out, tuple) else (out.logits, None)


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
