"""Hold a rollout as arrays, and cut it into micro batches.

    save_rollout(folder, rollout);  rollouts = load_rollouts(folder, [num_items])     # in a checkpoint

collect.py fills it; the engines that sample, and the groups' files, are in train/rollout/. Arrays only, no
pickles. `n` is groups x members.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rollout.groups import OF_ITS_ROLLOUT, Groups, read_groups, write_groups

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_GROUPS = "stage_rank_0_window.npz"
_VALUES = "stage_rank_0_values.npy"
_OLD_LOGPROBS = "stage_rank_0_old_logprobs.npy"
_AHEAD = "stage_rank_0_ahead-{}.npz"


@dataclass(frozen=True)
class Rollout:
    """Completions of one policy for several optimizer steps; the same on every rank except the times."""

    groups: Groups
    policy_id: str
    num_items: int
    """Items used up, dropped groups included."""
    index: int = 0
    """Its number. The policy it is trained from is the version of this number."""
    rollout_time_s: float = 0.0
    """On this rank, in this attempt, like the next."""
    reward_time_s: float = 0.0
    values: npt.NDArray[np.float64] | None = None
    """(n, longest), after a resume under PPO: the critic's values before the updates made since."""
    old_logprobs: npt.NDArray[np.float64] | None = None
    """The same, as Experience.old_logprobs."""
    engine_facts: dict[str, float] = field(default_factory=dict)
    """This rank's fields of train.jsonl about the weight update before it."""

    def facts(self, labels: Sequence[str] = (), *, by_group: bool = True) -> dict[str, Any]:
        """Return its fields of train.jsonl: rewards by term, lengths by outcome, shares without gradient.

        `labels` are of each group's task, if there are several: each is then reported too. Without `by_group`
        rewards are not compared with their group's mean: a group of equal rewards trains too (PPO,
        distillation), and its share is not reported.
        """
        groups = self.groups
        lengths, correct = groups.lengths.astype(np.float64), groups.correct
        facts: dict[str, Any] = {
            "reward": float(groups.rewards.mean()),
            "accuracy": float(correct.mean()),
            **{f"reward_{name}": float(values.mean()) for name, values in groups.terms.items()},
            "zero_variance_share": 1.0 - float(varied(groups).mean()) if by_group else None,
            "response_length": float(lengths.mean()),
            "response_length_correct": float(lengths[correct].mean()) if correct.any() else None,
            "response_length_wrong": float(lengths[~correct].mean()) if not correct.all() else None,
            "truncated_share": 1.0 - float(groups.ended.mean()),
            "scoring_failed_share": float(groups.failed.mean()),
            "num_groups": len(groups.items),
            "num_items": self.num_items,
        }
        for label in sorted(set(labels)):
            own = groups.select([at for at, each in enumerate(labels) if each == label])
            facts |= {
                f"task_{label}_reward": float(own.rewards.mean()),
                f"task_{label}_accuracy": float(own.correct.mean()),
                f"task_{label}_zero_variance_share": 1.0 - float(varied(own).mean()) if by_group else None,
                f"task_{label}_response_length": float(own.lengths.mean()),
                f"task_{label}_num_groups": len(own.items),
            }
        return facts

    def staleness(self) -> Rows:
        """Return (n, longest): how many versions behind each token's policy is; 0 on padding."""
        versions, lengths = self.groups.versions, self.groups.lengths
        is_known = (np.arange(versions.shape[1]) < lengths[:, None]) & (versions != OF_ITS_ROLLOUT)
        return np.where(is_known, self.index - versions.astype(np.int64), 0)

    def staleness_facts(self) -> dict[str, Any]:
        """Return its fields of train.jsonl; a group is as stale as its oldest token."""
        of_groups = self.staleness().reshape(len(self.groups.items), -1).max(1)
        return {"staleness_mean": float(of_groups.mean()), "staleness_max": int(of_groups.max())}

    def checksum(self) -> int:
        """Return a checksum of items, completions and rewards: equal for two runs on the same rollout."""
        digest = hashlib.sha256(self.groups.items.tobytes())
        for row, length in zip(self.groups.tokens, self.groups.lengths, strict=True):
            digest.update(row[:length].tobytes())
        digest.update(json.dumps([float(r).hex() for r in self.groups.rewards]).encode())
        return int.from_bytes(digest.digest()[:6])


def varied(groups: Groups, overlong_weight: float = 0.0) -> npt.NDArray[np.bool_]:
    """Return (groups,): True if the members were rewarded differently.

    With `overlong_weight` the term overlong, of this weight, is ignored: a group that is all wrong, with one
    member too long, tells nothing about its question (DAPO, arXiv 2503.14476, eq. 11).
    """
    rewards = groups.rewards
    if overlong_weight:
        rewards = rewards - overlong_weight * groups.terms["overlong"]
    return np.asarray(np.ptp(rewards.reshape(-1, groups.num_members), axis=1) > 1e-6)


def save_rollout(folder: Path, rollout: Rollout, ahead: Sequence[Rollout] = ()) -> None:
    """Save into a checkpoint being written, with the networks' values from before its updates. `ahead` are
    the rollouts sampled for later."""
    write_groups(folder / _GROUPS, rollout.groups, rollout.policy_id)
    for number, later in enumerate(ahead):
        write_groups(folder / _AHEAD.format(number), later.groups, later.policy_id)
    for name, kept in ((_VALUES, rollout.values), (_OLD_LOGPROBS, rollout.old_logprobs)):
        if kept is not None:
            np.save(folder / name, kept)


def load_rollouts(folder: Path, num_items: Sequence[int], index: int = 0) -> list[Rollout]:
    """Load what save_rollout left in a committed checkpoint, from rollout number `index` on; `num_items` of
    each. Return an empty list if no rollout was under way."""
    if not (folder / _GROUPS).exists():
        return []
    rollouts = []
    for number, num in enumerate(num_items):
        policy_id, groups = read_groups(folder / (_AHEAD.format(number - 1) if number else _GROUPS))
        rollouts.append(Rollout(groups, policy_id, num, index + number))
    paths, longest = (folder / _VALUES, folder / _OLD_LOGPROBS), rollouts[0].groups.tokens.shape[1]
    # A file of groups has no padding.
    values, old_logprobs = (np.load(path)[:, :longest] if path.exists() else None for path in paths)
    return [replace(rollouts[0], values=values, old_logprobs=old_logprobs), *rollouts[1:]]


@dataclass(frozen=True)
class Experience:
    """A rollout with everything its updates need, the same on every rank. n is its number of completions."""

    groups: Groups
    prompts: tuple[tuple[int, ...], ...]
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
    is_stale: npt.NDArray[np.bool_] | None = None
    """(n, longest): True for tokens that an older version sampled; rl.max_staleness above 0 only."""

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

    def spread(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """Lay out values per completion token (n, longest) as `targets`."""
        placed = np.zeros(self.columns.shape, np.float64)
        inside = np.arange(values.shape[1])[None, :] < self.lengths[:, None]
        placed[self.columns] = values[self.rows][inside]
        return torch.from_numpy(placed).to(self.targets.device, torch.float32)

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
    """|trainer's - sampler's log-probability|, only while the policy is the one that sampled, and of tokens
    that are not stale."""
    value_loss: float = 0.0
    importance: float = 0.0
    """Weights of truncated importance sampling as used, like the next two."""
    importance_squared: float = 0.0
    importance_capped: float = 0.0
    """Tokens whose weight was cut to rl.importance_cap."""
    importance_left_out: float = 0.0
    """Tokens that rl.importance_mask left out of the loss."""
    stale_tokens: float = 0.0
    """Tokens of older versions, in the first update of a rollout, like the next."""
    drift: float = 0.0
    """|trainer's - sampler's log-probability| of the stale tokens."""

    def per_token(self, total: float) -> float | None:
        """Return a sum as a mean over the trained tokens; None without any."""
        return total / self.tokens if self.tokens else None

    def mismatch(self) -> float | None:
        """Return the mean difference of the tokens that the current version sampled; None without any."""
        current = self.tokens - self.stale_tokens
        return self.difference / current if current else None

    def effective_share(self) -> float | None:
        """Return the importance weights' effective sample size (Kish) per token: 1 if all are equal."""
        if not self.importance_squared:
            return None
        return self.importance**2 / (self.tokens * self.importance_squared)


class Tally:
    """Adds up this rank's Sums on its device in float64, so that no step waits for the GPU."""

    def __init__(self, *, has_mask: bool = False, has_staleness: bool = False) -> None:
        """`has_mask`: also the sums of rl.importance_mask; `has_staleness`: also those of rl.max_staleness.
        Without them the ranks add up a vector of the old length: how a sum is rounded may depend on its place
        in the vector."""
        self._names = [column.name for column in fields(Sums)]
        if not has_staleness:
            first_unused = "stale_tokens" if has_mask else "importance_left_out"
            self._names = self._names[: self._names.index(first_unused)]
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, **parts: torch.Tensor) -> None:
        """Add scalars, by the names of Sums."""
        for name, part in parts.items():
            part = part.detach().double()
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def numbers(self) -> list[float]:
        """Return the sums in the order of `Sums(*numbers)`, to be added up over the ranks."""
        if not self._sums:
            return [0.0 for _ in self._names]
        known = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        return [known.get(name, 0.0) for name in self._names]
