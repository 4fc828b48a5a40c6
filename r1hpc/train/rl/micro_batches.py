"""Cut a rollout into micro batches: deal completions to the ranks by length, and pad them side by side.

    for mine in deal(experience.total_lengths(), rows, group, micro_batch_size): ...
    batch = lay_out(experience, mine, pad, device)

A Tally adds up an update's sums on the device, which is read once at the end:

    tally.add(entropy=entropies.sum())
    sums = Sums(*group.sum(tally.numbers()))
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.train.losses.algorithms import Floats
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rl.rollout import Groups

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Experience:
    """A rollout with everything its updates need, the same on every rank. n is its number of completions."""

    groups: Groups
    prompts: tuple[tuple[int, ...], ...]
    """Tokens of each group's prompt."""
    advantages: Floats
    """(n, longest); 0 beyond each completion."""
    counts: npt.NDArray[np.bool_]
    """(n,): False for completions left out of the loss."""
    returns: Floats | None = None
    """(n, longest): the critic's targets; PPO only."""
    values: Floats | None = None
    """(n, longest): the critic's values before the first update; PPO only."""
    old_logprobs: Floats | None = None
    """(n, longest): the trainer's log-probabilities before the first of several updates. Set with importance
    correction, and for GSPO in half precision; else the sampler's are used."""

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
    positions: torch.Tensor
    """Flat indices of the mask's True entries."""
    columns: npt.NDArray[np.bool_]
    rows: Rows
    lengths: npt.NDArray[np.int32]

    @property
    def num_kept(self) -> int:
        return int(self.targets.shape[1])

    def spread(self, values: npt.NDArray[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Lay out values per completion token (n, longest) as `targets`."""
        placed = np.zeros(self.columns.shape, np.float64)
        inside = np.arange(values.shape[1])[None, :] < self.lengths[:, None]
        placed[self.columns] = values[self.rows][inside]
        return torch.from_numpy(placed).to(self.targets.device, dtype)

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """Lay out (num tokens of completions,), row after row, as (rows, k); 0 elsewhere."""
        flat = values.new_zeros(self.mask.numel())
        return flat.index_copy(0, self.positions, values).view(self.mask.shape)

    def gathered(self, values: torch.Tensor, longest: int) -> Floats:
        """Invert `spread`: (rows, k) to (rows, longest) per completion token."""
        placed = np.zeros((len(self.rows), longest))
        inside = np.arange(longest)[None, :] < self.lengths[:, None]
        placed[inside] = values.double().cpu().numpy()[self.columns]
        return placed


def deal(lengths: Rows, rows: Rows, group: Group, micro_batch_size: int) -> list[Rows]:
    """Return this rank's rows of each micro batch: equally many on every rank, the last may be empty."""
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    at_once = group.world_size * micro_batch_size
    starts = range(0, max(1, len(ordered)), at_once)
    return [ordered[start : start + at_once][group.rank :: group.world_size] for start in starts]


def lay_out(experience: Experience, rows: Rows, pad: int, device: torch.device) -> MicroBatch:
    """Put prompt and completion of each row side by side, padded to the longest."""
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
    # Logits at t predict token t + 1: no column before the shortest prompt's last one is needed.
    first = min(map(len, prompts))
    columns = is_completion[:, first:]
    tensor = torch.from_numpy(ids).to(device)
    return MicroBatch(
        input_ids=tensor[:, :-1],
        targets=tensor[:, first:],
        mask=torch.from_numpy(columns).to(device),
        positions=torch.from_numpy(np.flatnonzero(columns)).to(device),
        columns=columns,
        rows=rows,
        lengths=lengths,
    )


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of one update."""

    tokens: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    """KL to the reference; in distillation, the divergence to the teacher."""
    difference: float = 0.0
    """|trainer's - sampler's log-probability|, only while the policy is the one that sampled."""
    value_loss: float = 0.0
    importance: float = 0.0
    """Weights of truncated importance sampling as used, like the next two."""
    importance_squared: float = 0.0
    importance_capped: float = 0.0
    """Tokens whose weight was cut to rl.importance_cap."""

    def per_token(self, total: float) -> float | None:
        """Return a sum as a mean over the trained tokens; None without any."""
        return total / self.tokens if self.tokens else None

    def effective_share(self) -> float | None:
        """Return the effective sample size (Kish) of the importance weights over the number of tokens: 1 if
        all weights are equal; None without weights."""
        if not self.importance_squared:
            return None
        return self.importance**2 / (self.tokens * self.importance_squared)


class Tally:
    """Adds up this rank's Sums on its device in float64, so that no step waits for the GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, **parts: torch.Tensor) -> None:
        """Add scalars, by the names of Sums."""
        for name, part in parts.items():
            part = part.detach().double()
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def numbers(self) -> list[float]:
        """Return the sums in the order of `Sums(*numbers)`, to be added up over the ranks."""
        if not self._sums:
            return [0.0 for _ in fields(Sums)]
        known = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        return [known.get(each.name, 0.0) for each in fields(Sums)]
