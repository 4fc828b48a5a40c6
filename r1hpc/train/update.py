"""One update by GRPO or PPO on the completions of a rollout: advantages, and the losses of its micro batches.

    experience = updater.prepare(engine, rollout, prompts)           # once per rollout
    rows = updater.rows_of(experience, update)                       # updates_per_rollout times
    losses = updater.losses(engine, experience, rows, is_first, tally)    # for loop.optimizer_step

Every rank knows the whole rollout, so which rows each takes is decided alike everywhere: rows that teach
nothing are left out, the rest is sorted by length and dealt, so that a micro batch holds rows of one length
and all ranks have equally many micro batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.config.schema import RunConfig
from r1hpc.plan.batch import updates_per_rollout
from r1hpc.train.algorithms import (
    Floats,
    entropy_sum,
    gae,
    group_advantages,
    policy_terms,
    selected_logprobs,
    token_weights,
    value_loss,
    whiten,
)
from r1hpc.train.distributed import Group
from r1hpc.train.policy import Reference
from r1hpc.train.rollout import Groups, Rollout

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Experience:
    """A rollout with everything its updates need, the same on every rank. n completions."""

    groups: Groups
    prompts: tuple[tuple[int, ...], ...]
    """Tokens of each group's prompt."""
    advantages: Floats
    """(n, longest); 0 beyond each completion."""
    counts: npt.NDArray[np.bool_]
    """(n,): completions that are part of the loss at all."""
    returns: Floats | None = None
    """(n, longest): what the critic is to learn; PPO only."""
    values: Floats | None = None
    """(n, longest): the critic's values before the first update; PPO only."""

    def prompt_of(self, row: int) -> tuple[int, ...]:
        return self.prompts[row // self.groups.num_members]

    def total_lengths(self) -> Rows:
        prompts = np.repeat([len(prompt) for prompt in self.prompts], self.groups.num_members)
        return np.asarray(prompts + self.groups.lengths, np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, right-padded. k = seq_len - first position that predicts a completion."""

    input_ids: torch.Tensor
    """(rows, seq_len)."""
    targets: torch.Tensor
    """(rows, k)."""
    mask: torch.Tensor
    """(rows, k): where a target is a token of the completion."""
    columns: npt.NDArray[np.bool_]
    rows: Rows
    lengths: npt.NDArray[np.int32]

    @property
    def num_kept(self) -> int:
        return int(self.targets.shape[1])

    def spread(self, values: npt.NDArray[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values per completion token (n, longest) of the rollout, laid out as `targets`."""
        placed = np.zeros(self.columns.shape, np.float64)
        inside = np.arange(values.shape[1])[None, :] < self.lengths[:, None]
        placed[self.columns] = values[self.rows][inside]
        return torch.from_numpy(placed).to(self.targets.device, dtype)

    def gathered(self, values: torch.Tensor, longest: int) -> Floats:
        """The inverse: (rows, k) as (rows, longest) per completion token."""
        placed = np.zeros((len(self.rows), longest))
        inside = np.arange(longest)[None, :] < self.lengths[:, None]
        placed[inside] = values.double().cpu().numpy()[self.columns]
        return placed


@dataclass
class Tally:
    """Sums over this rank's tokens of one update, to be added up over the ranks."""

    tokens: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    difference: float = 0.0
    """|log-probability by the trainer - by the sampler|; only while the policy is the one that sampled."""
    value_loss: float = 0.0

    def numbers(self) -> list[float]:
        """In the order in which `Tally(*numbers)` takes them back."""
        return list(vars(self).values())

    def per_token(self, total: float) -> float | None:
        """A sum as a mean over the tokens that were trained on; None where there was none."""
        return total / self.tokens if self.tokens else None


def deal(lengths: Rows, rows: Rows, group: Group, micro_batch_size: int) -> list[Rows]:
    """This rank's rows of each micro batch; every rank gets equally many lists, the last may be empty."""
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    at_once = group.world_size * micro_batch_size
    starts = range(0, max(1, len(ordered)), at_once)
    return [ordered[start : start + at_once][group.rank :: group.world_size] for start in starts]


def lay_out(experience: Experience, rows: Rows, pad: int, device: torch.device) -> MicroBatch:
    """Prompt and completion of each row side by side, padded to the longest."""
    groups = experience.groups
    prompts = [experience.prompt_of(int(row)) for row in rows]
    lengths = groups.lengths[rows]
    longest = max(len(p) + int(n) for p, n in zip(prompts, lengths, strict=True))
    ids = np.full((len(rows), longest), pad, np.int64)
    is_completion = np.zeros((len(rows), longest), np.bool_)
    for line, (row, prompt, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
        end = len(prompt) + int(length)
        ids[line, : len(prompt)] = prompt
        ids[line, len(prompt) : end] = groups.tokens[row, :length]
        is_completion[line, len(prompt) : end] = True
    # The logits at position t are of token t + 1: no column before the shortest prompt's last one is needed.
    first = min(map(len, prompts))
    columns = is_completion[:, first:]
    tensor = torch.from_numpy(ids).to(device)
    return MicroBatch(
        input_ids=tensor[:, :-1],
        targets=tensor[:, first:],
        mask=torch.from_numpy(columns).to(device),
        columns=columns,
        rows=rows,
        lengths=lengths,
    )


@dataclass(frozen=True)
class Forward:
    """What the networks say of a micro batch; each (rows, k)."""

    logits: torch.Tensor
    """(rows, k, vocab)."""
    logprobs: torch.Tensor
    """By the policy that is trained, of the targets."""
    values: torch.Tensor | None
    """By the critic; PPO only."""
    reference: torch.Tensor | None
    """Log-probabilities by the reference, where the KL is taken."""

    def nothing(self) -> torch.Tensor:
        """A loss of 0 that reaches every parameter."""
        return (self.logprobs * 0).sum() + (0 if self.values is None else (self.values * 0).sum())


class Updater:
    """The losses of one run. Every method is given the engine that is trained, and is called on all ranks."""

    def __init__(self, config: RunConfig, group: Group, pad: int, reference: Reference | None) -> None:
        self._config = config
        self._group = group
        self._pad = pad
        self._reference = reference
        self._is_ppo = config.rl.algorithm == "ppo"

    def prepare(self, engine: Any, rollout: Rollout, prompts: Sequence[tuple[int, ...]]) -> Experience:
        """Advantages of a rollout; under PPO the critic's values too, worked out by all ranks together."""
        rl, groups = self._config.rl, rollout.groups
        longest = groups.tokens.shape[1]
        # Overlong filtering (DAPO, arXiv 2503.14476, section 3.4): a completion that was cut off says nothing
        # of how its reasoning would have ended.
        counts = groups.ended if rl.mask_truncated else np.ones(len(groups.lengths), np.bool_)
        inside = np.arange(longest)[None, :] < groups.lengths[:, None]
        if not self._is_ppo:
            # GRPO: the reward is of the whole completion, so each of its tokens has the same advantage.
            advantages = group_advantages(
                groups.rewards.reshape(len(groups.items), -1), rl.scale_advantage
            ).ravel()
            return Experience(groups, tuple(prompts), np.where(inside, advantages[:, None], 0.0), counts)
        bare = Experience(groups, tuple(prompts), np.zeros(inside.shape), counts)
        # After a resume between two updates the critic is not the one that GAE was worked out with any more.
        values = self._values(engine, bare) if rollout.values is None else rollout.values
        advantages, returns = gae(groups.rewards, values, groups.lengths, rl.gamma, rl.gae_lambda)
        whitened = whiten(advantages, inside & counts[:, None])
        return Experience(groups, tuple(prompts), whitened, counts, returns, values)

    def losses(
        self, engine: Any, experience: Experience, rows: Rows, is_first: bool, tally: Tally
    ) -> Iterator[torch.Tensor]:
        """The loss of each micro batch of an update on `rows`, for loop.optimizer_step.

        Args:
            is_first: no update has been made since the rollout, so the trainer's policy is the sampler's.
            tally: is added up as the losses are made.
        """
        weights = self._token_weights(experience, rows)
        taught = rows[self._teaches(experience, rows, weights)]
        size = self._config.train.micro_batch_size
        micro_batches = deal(experience.total_lengths(), taught, self._group, size)
        for number, mine in enumerate(micro_batches):
            # How many micro batches there are depends on the rollout, so DeepSpeed cannot count to the last.
            engine.set_gradient_accumulation_boundary(number + 1 == len(micro_batches))
            # A rank without rows must take part all the same: DeepSpeed reduces in the backward pass, and
            # under ZeRO 3 every forward pass gathers parameters, the reference's with adapters too.
            batch = lay_out(experience, mine if len(mine) else rows[:1], self._pad, self._group.device)
            forward = self._forward(engine, batch)
            if not len(mine):
                yield forward.nothing()
                continue
            loss = self._loss(experience, batch, forward, weights[mine], is_first, tally)
            # DeepSpeed takes the mean over the ranks; the weights make the sum over them the mean wanted.
            yield loss * self._group.world_size

    def rows_of(self, experience: Experience, update: int) -> Rows:
        """The completions of update number `update` (from 0): whole groups, in their order."""
        per_pass = self._num_updates // self._config.rl.num_iterations
        parts = np.array_split(np.arange(len(experience.groups.items)), per_pass)
        members = experience.groups.num_members
        chosen = parts[update % per_pass]
        return np.asarray((chosen[:, None] * members + np.arange(members)).ravel(), np.int64)

    @property
    def _num_updates(self) -> int:
        return updates_per_rollout(self._config)

    def _token_weights(self, experience: Experience, rows: Rows) -> Floats:
        """(n,): weight of a token of each completion, so that the sum over `rows` is the mean wanted.

        Over all rows of the update, those that are left out of the computation included: the denominator
        must depend neither on the number of ranks nor on what teaches nothing.
        """
        weights = np.zeros(len(experience.groups.lengths))
        weights[rows] = token_weights(
            experience.groups.lengths[rows],
            experience.counts[rows],
            self._config.rl.loss_level,
            self._config.rollout.max_completion_length,
        )
        return weights

    def _teaches(self, experience: Experience, rows: Rows, weights: Floats) -> npt.NDArray[np.bool_]:
        """Not: rows without weight, and those without advantage where nothing else pulls at them."""
        teaches: npt.NDArray[np.bool_] = weights[rows] > 0
        if not self._is_ppo and self._config.rl.kl_coef == 0:
            teaches &= np.abs(experience.advantages[rows]).max(1) > 0
        return teaches

    def _loss(
        self,
        experience: Experience,
        batch: MicroBatch,
        forward: Forward,
        weights: Floats,
        is_first: bool,
        tally: Tally,
    ) -> torch.Tensor:
        """This micro batch's part of the clipped policy loss, its KL term and the critic's loss."""
        rl, logprobs, temperature = self._config.rl, forward.logprobs, self._config.rollout.temperature
        sampled = batch.spread(experience.groups.logprobs)
        per_token = batch.mask * torch.from_numpy(weights).to(logprobs)[:, None]
        # With a single update per rollout the old policy is the policy: the ratio is 1 and its gradient that
        # of log pi. The trainer's own values keep the sampler's rounding (bf16, other kernels) out of it.
        on_policy = is_first and self._num_updates == 1
        terms = policy_terms(
            logprobs,
            logprobs.detach() if on_policy else sampled,
            batch.spread(experience.advantages),
            per_token,
            batch.mask,
            rl,
            forward.reference,
        )
        loss = terms.loss
        tally.tokens += float(batch.mask.sum())
        tally.entropy += float(entropy_sum(forward.logits, batch.mask, temperature))
        tally.clipped += float(terms.clipped)
        tally.kl += float(terms.kl)
        if is_first:
            tally.difference += float(((logprobs.detach() - sampled).abs() * batch.mask).sum())
        if forward.values is not None and experience.values is not None and experience.returns is not None:
            critic = value_loss(
                forward.values.float(),
                batch.spread(experience.values),
                batch.spread(experience.returns),
                per_token,
                rl.value_clip,
            )
            tally.value_loss += float(critic.detach())
            loss = loss + rl.value_coef * critic
        return loss

    def _forward(self, engine: Any, batch: MicroBatch) -> Forward:
        logits, values = self._logits_and_values(engine, batch)
        logprobs = selected_logprobs(logits, batch.targets, self._config.rollout.temperature)
        return Forward(logits, logprobs, values, self._reference_logprobs(engine, batch))

    def _logits_and_values(self, engine: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = engine(input_ids=batch.input_ids, logits_to_keep=batch.num_kept)
        return out if self._is_ppo else (out.logits, None)

    def _reference_logprobs(self, engine: Any, batch: MicroBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with torch.no_grad(), self._reference.policy(engine) as network:
            logits = network(input_ids=batch.input_ids, logits_to_keep=batch.num_kept).logits
            return selected_logprobs(logits, batch.targets, self._config.rollout.temperature)

    @torch.no_grad()
    def _values(self, engine: Any, experience: Experience) -> Floats:
        """(n, longest): each rank works out its share, and the sum over the ranks is the whole."""
        groups = experience.groups
        values = np.zeros(groups.tokens.shape)
        everything = np.arange(len(groups.lengths))
        size = self._config.train.micro_batch_size
        for mine in deal(experience.total_lengths(), everything, self._group, size):
            rows = mine if len(mine) else everything[:1]  # as in losses: no rank may stay away
            batch = lay_out(experience, rows, self._pad, self._group.device)
            _, found = self._logits_and_values(engine, batch)
            assert found is not None, "PPO has a critic"
            if len(mine):
                values[mine] = batch.gathered(found, groups.tokens.shape[1])
        return self._group.sum_array(values)
