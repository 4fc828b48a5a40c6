"""A rollout as arrays: groups of completions with their log-probabilities and rewards, and how it is kept.

    groups = Groups.joined([batch_0, batch_1])
    write_groups(path, groups, policy_id);  policy_id, groups = read_groups(path)

Arrays only, no pickles. A group is the completions of one item, side by side; `n` is groups x members.
"""

import secrets
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import StateError

_TERM = "term_"


@dataclass(frozen=True)
class Groups:
    """Finished groups in the order of their items."""

    items: npt.NDArray[np.int64]
    """(groups,): indices of the task."""
    tokens: npt.NDArray[np.int32]
    """(n, longest), padded."""
    logprobs: npt.NDArray[np.float32]
    """(n, longest): by the policy that sampled them."""
    lengths: npt.NDArray[np.int32]
    ended: npt.NDArray[np.bool_]
    """(n,): False where max_completion_length cut it off."""
    rewards: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    terms: dict[str, npt.NDArray[np.float64]]
    """Each reward term by itself, unweighted, (n,)."""

    @property
    def num_members(self) -> int:
        return len(self.lengths) // max(1, len(self.items))

    def select(self, groups: Sequence[int] | npt.NDArray[np.integer[Any]]) -> "Groups":
        """Only these groups, in this order."""
        chosen = np.asarray(groups, np.int64)
        rows = (chosen[:, None] * self.num_members + np.arange(self.num_members)).ravel()
        return Groups(
            items=self.items[chosen],
            tokens=self.tokens[rows],
            logprobs=self.logprobs[rows],
            lengths=self.lengths[rows],
            ended=self.ended[rows],
            rewards=self.rewards[rows],
            correct=self.correct[rows],
            terms={name: values[rows] for name, values in self.terms.items()},
        )

    @staticmethod
    def joined(parts: Sequence["Groups"]) -> "Groups":
        """One after the other, padded to the longest."""
        longest = max(part.tokens.shape[1] for part in parts)
        names = parts[0].terms

        def column(name: str) -> Any:
            return np.concatenate([getattr(part, name) for part in parts])

        def padded(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return np.concatenate([np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in arrays])

        return Groups(
            items=column("items"),
            tokens=padded("tokens"),
            logprobs=padded("logprobs"),
            lengths=column("lengths"),
            ended=column("ended"),
            rewards=column("rewards"),
            correct=column("correct"),
            terms={name: np.concatenate([part.terms[name] for part in parts]) for name in names},
        )


def write_groups(path: Path, groups: Groups, policy_id: str) -> None:
    """Write so that a killed process leaves the whole file or none.

    Not fsynced: what a power cut spoils fails its zip checksum, and is sampled again.
    """
    arrays = {name: value for name, value in vars(groups).items() if name != "terms"}
    arrays |= {f"{_TERM}{name}": values for name, values in groups.terms.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("xb") as file:
        np.savez(file, policy_id=np.array(policy_id), **arrays)
    temporary.replace(path)


def read_groups(path: Path) -> tuple[str, Groups]:
    """What write_groups wrote.

    Raises:
        StateError: the file is not one of ours, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        policy_id = str(arrays.pop("policy_id"))
        terms = {
            name.removeprefix(_TERM): arrays.pop(name) for name in list(arrays) if name.startswith(_TERM)
        }
        return policy_id, Groups(**arrays, terms=terms)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} holds no rollout: {error}") from None
