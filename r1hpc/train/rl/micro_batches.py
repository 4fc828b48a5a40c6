"""The completions of a rollout as micro batches: dealt to the ranks by length, and laid out side by side.

for mine in deal(experience.total_lengths(), rows, group, micro_batch_size): ...
batch = lay_out(experience, mine, pad, device)

What an update adds up over its tokens, and where: on the device, read once at its end.

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
    old_logprobs: Floats | None = None
    """(n, longest): the trainer's log-probabilities before the first of several updates, where importance is
    corrected, and for GSPO in half precision; else the sampler's stand for them."""

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
    """Of those in the flat mask."""
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

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """(num tokens of completions,), row after row, as (rows, k); 0 elsewhere."""
        flat = values.new_zeros(self.mask.numel())
        return flat.index_copy(0, self.positions, values).view(self.mask.shape)

    def gathered(self, values: torch.Tensor, longest: int) -> Floats:
        """The inverse: (rows, k) as (rows, longest) per completion token."""
        placed = np.zeros((len(self.rows), longest))
        inside = np.arange(longest)[None, :] < self.lengths[:, None]
        placed[inside] = values.double().cpu().numpy()[self.columns]
        return placed


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
        positions=torch.from_numpy(np.flatnonzero(columns)).to(device),
        columns=columns,
        rows=rows,
        lengths=lengths,
    )


@dataclass(frozen=True)
class Sums:
    """Over the tokens of one update."""

    tokens: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    """To the reference; of distillation the divergence to the teacher."""
    difference: float = 0.0
    """|log-probability by the trainer - by the sampler|; only while the policy is the one that sampled."""
    value_loss: float = 0.0
    importance: float = 0.0
    """Weights of truncated importance sampling, as they were used; like the next two."""
    importance_squared: float = 0.0
    importance_capped: float = 0.0
    """Tokens whose weight was cut to rl.importance_cap."""

    def per_token(self, total: float) -> float | None:
        """A sum as a mean over the tokens that were trained on; None where there was none."""
        return total / self.tokens if self.tokens else None

    def effective_share(self) -> float | None:
        """The effective sample size (Kish) of the importance weights over the number of tokens: 1 where all
        weigh alike; None where none were taken."""
        if not self.importance_squared:
            return None
        return self.importance**2 / (self.tokens * self.importance_squared)


class Tally:
    """Adds up this rank's Sums where its tensors lie, in float64: nobody waits for a GPU within the step."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, **parts: torch.Tensor) -> None:
        """Scalars, by the names of Sums."""
        for name, part in parts.items():
            part = part.detach().double()
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def numbers(self) -> list[float]:
        """In the order in which `Sums(*numbers)` takes them, to be added up over the ranks."""
        if not self._sums:
            return [0.0 for _ in fields(Sums)]
        known = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        return [known.get(each.name, 0.0) for each in fields(Sums)]
