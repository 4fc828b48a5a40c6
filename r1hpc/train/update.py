"""One optimizer step of GRPO or PPO on the completions of a rollout.

Every rank knows the whole rollout, so which rows each takes is decided alike everywhere: rows that teach
nothing are left out, the rest is sorted by length and dealt, so that a micro batch holds rows of one length
and all ranks have equally many micro batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from r1hpc.train.rollout import Groups

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rollout:
    """A rollout with everything an update needs, the same on every rank. n completions."""

    groups: Groups
    prompts: tuple[tuple[int, ...], ...]
    """Tokens of each group's prompt."""
    advantages: Floats
    """(n, longest)."""
    returns: Floats | None
    """(n, longest), and the critic's old word; PPO only."""
    values: Floats | None
    counts: npt.NDArray[np.bool_]
    """(n,): completions that are part of the loss at all."""

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
    """Of |log-probability by the trainer - by the sampler|; only while the policy is the one that sampled."""
    value_loss: float = 0.0

    def numbers(self) -> list[float]:
        return list(vars(self).values())


def deal(lengths: Rows, rows: Rows, group: Group, micro_batch_size: int) -> list[Rows]:
    """This rank's rows of each micro batch; every rank gets equally many lists, the last may be empty."""
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    at_once = group.world_size * micro_batch_size
    starts = range(0, max(1, len(ordered)), at_once)
    return [ordered[start : start + at_once][group.rank :: group.world_size] for start in starts]


def lay_out(rollout: Rollout, rows: Rows, pad: int, device: torch.device) -> MicroBatch:
    """Prompt and completion of each row side by side, padded to the longest."""
    groups = rollout.groups
    prompts = [rollout.prompt_of(int(row)) for row in rows]
    lengths = groups.lengths[rows]
    longest = max(len(p) + int(n) for p, n in zip(prompts, lengths, strict=True))
    ids = np.full((len(rows), longest), pad, np.int64)
    is_completion = np.zeros((len(rows), longest), np.bool_)
    for line, (row, prompt, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
        end = len(prompt) + int(length)
        ids[line, : len(prompt)] = prompt
        ids[line, len(prompt) : end] = groups.tokens[row, :length]
        is_completion[line, len(prompt) : end] = True
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


class Updater:
    """Takes optimizer steps on rollouts with one engine."""

    def __init__(
        self, config: RunConfig, group: Group, engine: Any, pad: int, reference: "Reference | None"
    ) -> None:
        self._config = config
        self._group = group
        self._engine = engine
        self._pad = pad
        self._reference = reference
        self._is_ppo = config.rl.algorithm == "ppo"

    def prepare(
        self, groups: Groups, prompts: Sequence[tuple[int, ...]], values: Floats | None = None
    ) -> Rollout:
        """Advantages of a rollout; under PPO the critic's values too, worked out by all ranks together.

        Args:
            values: the critic's, where they are known from before a resume.
        """
        rl, longest = self._config.rl, groups.tokens.shape[1]
        counts = groups.ended if rl.mask_truncated else np.ones(len(groups.lengths), np.bool_)
        inside = np.arange(longest)[None, :] < groups.lengths[:, None]
        if not self._is_ppo:
            advantages = group_advantages(
                groups.rewards.reshape(len(groups.items), -1), rl.scale_advantage
            ).ravel()
            spread = np.where(inside, advantages[:, None], 0.0)
            return Rollout(groups, tuple(prompts), spread, None, None, counts)
        bare = Rollout(groups, tuple(prompts), np.zeros(inside.shape), None, None, counts)
        values = self._values(bare) if values is None else values
        advantages, returns = gae(groups.rewards, values, groups.lengths, rl.gamma, rl.gae_lambda)
        whitened = whiten(advantages, inside & counts[:, None])
        return Rollout(groups, tuple(prompts), whitened, returns, values, counts)

    def losses(self, rollout: Rollout, rows: Rows, is_first: bool, tally: Tally) -> Iterator[torch.Tensor]:
        """The loss of each micro batch of an update on `rows`, for engine.accumulate.

        Args:
            is_first: no update has been made since the rollout, so the trainer's policy is the sampler's.
        """
        rl, group = self._config.rl, self._group
        weights = np.zeros(len(rollout.groups.lengths))
        weights[rows] = token_weights(
            rollout.groups.lengths[rows],
            rollout.counts[rows],
            rl.loss_level,
            self._config.rollout.max_completion_length,
        )
        # Left out: rows without weight, and those without advantage where nothing else pulls at them.
        teaching = weights[rows] > 0
        if not self._is_ppo and rl.kl_coef == 0:
            teaching &= np.abs(rollout.advantages[rows]).max(1) > 0
        micro_batches = deal(
            rollout.total_lengths(), rows[teaching], group, self._config.train.micro_batch_size
        )
        single_update = self._num_updates == 1
        for number, mine in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(number + 1 == len(micro_batches))
            # A rank without rows must take part all the same: DeepSpeed reduces in the backward pass.
            batch = lay_out(rollout, mine if len(mine) else rows[:1], self._pad, group.device)
            logits, values = self._forward(batch)
            logprobs = selected_logprobs(logits, batch.targets, self._config.rollout.temperature)
            # On all ranks or none: under ZeRO 3 it gathers parameters.
            reference = self._reference_logprobs(batch)
            if not len(mine):
                yield (logprobs * 0).sum() + (0 if values is None else (values * 0).sum())
                continue
            sampled = batch.spread(rollout.groups.logprobs)
            per_token = batch.mask * torch.from_numpy(weights[mine]).to(logprobs)[:, None]
            terms = policy_terms(
                logprobs,
                logprobs.detach() if is_first and single_update else sampled,
                batch.spread(rollout.advantages),
                per_token,
                batch.mask,
                rl,
                reference,
            )
            loss = terms.loss
            tally.tokens += float(batch.mask.sum())
            tally.entropy += float(entropy_sum(logits, batch.mask, self._config.rollout.temperature))
            tally.clipped += float(terms.clipped)
            tally.kl += float(terms.kl)
            if is_first:
                tally.difference += float(((logprobs.detach() - sampled).abs() * batch.mask).sum())
            if values is not None and rollout.values is not None and rollout.returns is not None:
                critic = value_loss(
                    values.float(),
                    batch.spread(rollout.values),
                    batch.spread(rollout.returns),
                    per_token,
                    rl.value_clip,
                )
                tally.value_loss += float(critic.detach())
                loss = loss + rl.value_coef * critic
            # DeepSpeed takes the mean over the ranks; the weights make the sum over them the mean wanted.
            yield loss * group.world_size

    def rows_of(self, rollout: Rollout, update: int) -> Rows:
        """The completions of update number `update` (from 0): whole groups, in their order."""
        per_pass = self._num_updates // self._config.rl.num_iterations
        parts = np.array_split(np.arange(len(rollout.groups.items)), per_pass)
        members = rollout.groups.num_members
        chosen = parts[update % per_pass]
        return np.asarray((chosen[:, None] * members + np.arange(members)).ravel(), np.int64)

    @property
    def _num_updates(self) -> int:
        return updates_per_rollout(self._config)

    def _forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = self._engine(input_ids=batch.input_ids, logits_to_keep=batch.num_kept)
        return out if self._is_ppo else (out.logits, None)

    def _reference_logprobs(self, batch: MicroBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with torch.no_grad(), self._reference.policy(self._engine) as network:
            logits = network(input_ids=batch.input_ids, logits_to_keep=batch.num_kept).logits
            return selected_logprobs(logits, batch.targets, self._config.rollout.temperature)

    @torch.no_grad()
    def _values(self, rollout: Rollout) -> Floats:
        """(n, longest): each rank works out its share, and the sum over the ranks is the whole."""
        groups = rollout.groups
        values = np.zeros(groups.tokens.shape)
        everything = np.arange(len(groups.lengths))
        size = self._config.train.micro_batch_size
        for mine in deal(rollout.total_lengths(), everything, self._group, size):
            batch = lay_out(rollout, mine if len(mine) else everything[:1], self._pad, self._group.device)
            _, found = self._forward(batch)
            assert found is not None, "PPO has a critic"
            if len(mine):
                values[mine] = batch.gathered(found, groups.tokens.shape[1])
        return self._group.sum_array(values)


@dataclass(frozen=True)
class Reference:
    """The policy that the KL is taken to: frozen weights, or the adapters' base where there are adapters."""

    network: torch.nn.Module | None
    id: str
    """Names its weights."""
    without_adapters: Any = None
    """With LoRA: gives a context in which the policy's own network is the reference."""

    def policy(self, engine: Any) -> AbstractContextManager[Any]:
        if self.network is not None:
            return nullcontext(self.network)
        context: AbstractContextManager[Any] = self.without_adapters(engine.module)
        return context
