"""Hold finished groups of completions as arrays, and write and read them as files.

    groups = Groups.joined([batch_0, batch_1])
    write_groups(path, groups, policy_id);  policy_id, groups = read_groups(path)

A group is the completions of one item, side by side; `n` is groups x members. A file is an npz without
pickles, in format 2:

    format           (), 2
    items            (groups,); rewards, correct, failed, term_<name>: (n,)
    tokens, offsets  (T,) and (n + 1,): prompt and all turns of each row, row after row
    sampled          (T,): True for tokens that the model drew and that are trained on
    logprobs         (T,): of the sampled tokens, under the distribution that they were drawn from; else 0
    spans            (s, 5): row, first, end, turn, kind (PROMPT, SAMPLED, TOOL, USER); positions in the row
    versions         (v, 4): row, first, end, version of the weights that sampled these tokens
    finish           (n,): ENDED, TOO_LONG, MOST_TURNS, TOOL_FAILED, OUT_OF_TIME
    sampler          JSON: the id of the policy, and what else the writer knows about the sampling

Readers ignore other arrays. Format 1 (no `format`; rows padded, no prompts) stays readable.
"""

import hashlib
import io
import json
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

FORMAT = 2
PROMPT, SAMPLED, TOOL, USER = range(4)
ENDED, TOO_LONG, MOST_TURNS, TOOL_FAILED, OUT_OF_TIME = range(5)
OF_ITS_ROLLOUT = -1
"""The version in files of format 1, which were sampled by the policy of their rollout."""
_TERM = "term_"
_OF_ROWS = ("rewards", "correct", "failed")


@dataclass(frozen=True)
class Groups:
    """Finished groups in the order of their items."""

    items: npt.NDArray[np.int64]
    """(groups,): indices of the task."""
    tokens: Ints
    """(n, longest), padded."""
    logprobs: npt.NDArray[np.float32]
    """(n, longest): by the policy that sampled them."""
    versions: Ints
    """(n, longest): of the weights that sampled each token; OF_ITS_ROLLOUT in files of format 1."""
    lengths: Ints
    ended: Bools
    """(n,): False where max_completion_length cut it off."""
    rewards: npt.NDArray[np.float64]
    correct: Bools
    failed: Bools
    """(n,): True where the judge or a custom reward term failed."""
    terms: dict[str, npt.NDArray[np.float64]]
    """Each reward term, unweighted, (n,)."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """The tokens of each group's prompt; empty if a part came from a file of format 1."""

    @property
    def num_members(self) -> int:
        return len(self.lengths) // max(1, len(self.items))

    def select(self, groups: Sequence[int] | npt.NDArray[np.integer[Any]]) -> "Groups":
        """Return only these groups, in this order."""
        chosen = np.asarray(groups, np.int64)
        rows = (chosen[:, None] * self.num_members + np.arange(self.num_members)).ravel()
        by_group = ("items", "terms", "prompts")
        arrays = {name: values[rows] for name, values in vars(self).items() if name not in by_group}
        terms = {name: values[rows] for name, values in self.terms.items()}
        prompts = tuple(self.prompts[group] for group in chosen) if self.prompts else ()
        return Groups(items=self.items[chosen], terms=terms, prompts=prompts, **arrays)

    @staticmethod
    def joined(parts: Sequence["Groups"]) -> "Groups":
        """Concatenate groups, padded to the longest."""
        longest = max(part.tokens.shape[1] for part in parts)

        def column(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            if arrays[0].ndim == 2:
                arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays]
            return np.concatenate(arrays)

        terms = {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms}
        prompts = tuple(prompt for part in parts for prompt in part.prompts)
        if not all(part.prompts for part in parts):
            prompts = ()
        names = [name for name in vars(parts[0]) if name not in ("terms", "prompts")]
        return Groups(**{name: column(name) for name in names}, terms=terms, prompts=prompts)


def write_groups(path: Path, groups: Groups, policy_id: str, sampler: Mapping[str, Any] | None = None) -> str:
    """Write atomically; return the file's sha256. `sampler` holds more facts about the sampling, for people.

    Not fsynced: a file damaged by a power cut fails its checksum and is not used.
    """
    file = io.BytesIO()
    np.savez(file, **_arrays(groups, {"policy": policy_id, **(sampler or {})}))
    raw = file.getvalue()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("xb") as out:
        out.write(raw)
    temporary.replace(path)
    return hashlib.sha256(raw).hexdigest()


def read_groups(path: Path, sha256: str | None = None) -> tuple[str, Groups]:
    """Return policy id and groups; raise StateError if the file is not one of ours, or damaged. With `sha256`
    also if its bytes have another digest."""
    try:
        with open_plain(path) as file:
            raw = file.read()
        if sha256 not in (None, hashlib.sha256(raw).hexdigest()):
            raise ValueError(f"its sha256 is not {sha256}")
        with np.load(io.BytesIO(raw), allow_pickle=False) as opened:
            arrays = dict(opened)
        named = [name for name in arrays if name.startswith(_TERM)]
        terms = {name.removeprefix(_TERM): arrays.pop(name) for name in named}
        if "format" not in arrays:  # format 1
            policy_id = str(arrays.pop("policy_id"))
            arrays.setdefault("failed", np.zeros(len(arrays["lengths"]), np.bool_))  # older still
            versions = np.full(arrays["tokens"].shape, OF_ITS_ROLLOUT, np.int32)
            return policy_id, Groups(**arrays, versions=versions, terms=terms)
        if int(arrays["format"]) != FORMAT:
            raise ValueError(
                f"it has format {arrays['format']}, and this version of r1hpc reads up to {FORMAT}"
            )
        return str(json.loads(str(arrays["sampler"]))["policy"]), _unpacked(arrays, terms)
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} holds no rollout: {error}") from None


def _arrays(groups: Groups, sampler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of a file in format 2."""
    assert groups.prompts, "a file of format 2 has the prompts"
    prompt_lengths = np.repeat([len(prompt) for prompt in groups.prompts], groups.num_members)
    totals = prompt_lengths + groups.lengths
    offsets = np.concatenate([[0], np.cumsum(totals)])
    tokens = np.zeros(offsets[-1], np.int32)
    logprobs, sampled = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.bool_)
    spans: list[tuple[int, ...]] = []
    versions: list[tuple[int, ...]] = []
    for row, (first, total) in enumerate(zip(prompt_lengths.tolist(), totals.tolist(), strict=True)):
        start, length = int(offsets[row]), total - first
        tokens[start : start + first] = groups.prompts[row // groups.num_members]
        tokens[start + first : start + total] = groups.tokens[row, :length]
        logprobs[start + first : start + total] = groups.logprobs[row, :length]
        sampled[start + first : start + total] = True
        spans += [(row, 0, first, 0, PROMPT), (row, first, total, 0, SAMPLED)]
        own = groups.versions[row, :length]
        edges = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist(), length]
        versions += [
            (row, first + low, first + high, int(own[low])) for low, high in pairwise(edges) if high > low
        ]
    return {
        "format": np.array(FORMAT),
        "items": groups.items,
        "tokens": tokens,
        "offsets": offsets,
        "sampled": sampled,
        "logprobs": logprobs,
        "spans": np.array(spans, np.int32).reshape(-1, 5),
        "versions": np.array(versions, np.int32).reshape(-1, 4),
        "finish": np.where(groups.ended, ENDED, TOO_LONG).astype(np.uint8),
        "sampler": np.array(json.dumps(sampler)),
        **{name: getattr(groups, name) for name in _OF_ROWS},
        **{f"{_TERM}{name}": values for name, values in groups.terms.items()},
    }


def _unpacked(arrays: dict[str, Any], terms: dict[str, Any]) -> Groups:
    """Return the groups of a file in format 2. Raise ValueError if a completion has several turns."""
    offsets, sampled, items = arrays["offsets"], arrays["sampled"], arrays["items"]
    num, members = len(offsets) - 1, (len(offsets) - 1) // max(1, len(items))
    if any(len(arrays[name]) != num for name in (*_OF_ROWS, "finish")) or members * len(items) != num:
        raise ValueError("its arrays do not belong together")
    rows = [slice(*map(int, pair)) for pair in pairwise(offsets)]
    firsts = [int(sampled[row].argmax()) if sampled[row].any() else row.stop - row.start for row in rows]
    if not all(sampled[row][first:].all() for row, first in zip(rows, firsts, strict=True)):
        raise ValueError("it has completions of several turns, which this version of r1hpc does not train on")
    lengths = np.array(
        [row.stop - row.start - first for row, first in zip(rows, firsts, strict=True)], np.int32
    )
    shape = (num, int(lengths.max(initial=1)))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for at, (row, first, length) in enumerate(zip(rows, firsts, lengths, strict=True)):
        tokens[at, :length] = arrays["tokens"][row][first:]
        logprobs[at, :length] = arrays["logprobs"][row][first:]
    versions = np.zeros(shape, np.int32)
    for at, first, end, version in arrays["versions"].tolist():
        versions[at, first - firsts[at] : end - firsts[at]] = version
    prompts = [arrays["tokens"][row][:first] for row, first in zip(rows, firsts, strict=True)]
    return Groups(
        items=items,
        tokens=tokens,
        logprobs=logprobs,
        versions=versions,
        lengths=lengths,
        ended=arrays["finish"] == ENDED,
        terms=terms,
        prompts=tuple(tuple(prompt.tolist()) for prompt in prompts[:: max(1, members)]),
        **{name: arrays[name] for name in _OF_ROWS},
    )
