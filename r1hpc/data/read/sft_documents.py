"""Read a dataset of traces by document: prompt, completion and the boundary. Hold some documents out.

    traces = open_traces(Path("data/cold-start"))
    tokens, num_prompt_tokens = traces.read_document(17)

Tokens are read and verified as in reader.py; a small dataset is read completely at its first document and
kept in memory. Opening reads, verifies and compares the lengths and roles of all documents: 24 bytes of
memory each.

    part = hold_out(traces, num=200, seed=0)
    part.held_out                   # (200,): numbers of documents, of each source its share
    part.siblings                   # documents with the same prompts: neither held out nor trained on
    part.training(items)            # items of [0, part.sizes of all sources) to documents

Held-out documents, for a validation loss, follow from the dataset and the seed alone, so all ranks and
attempts agree.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.format.documents import has_roles, read_lengths
from r1hpc.data.format.errors import DataError
from r1hpc.data.read.mixture import divide
from r1hpc.data.read.order import Ints, visit
from r1hpc.data.read.reader import TokenDataset, open_dataset

KEPT_BYTES = 16 * 2**20
"""Tokens of a dataset up to this size stay in memory, unless every read must verify."""
_AT_ONCE = 2**22
"""Tokens read together when all are read."""


def open_traces(path: Path | str, expected_id: str | None = None, *, verify: str = "once") -> "TraceDataset":
    """Open a dataset of traces; arguments and errors as for open_dataset.

    Raise DataError if its documents have no roles; ShardCorruptError if roles or offsets do not fit.
    """
    tokens = open_dataset(path, expected_id, verify=verify)
    manifest = tokens.manifest
    if not has_roles(manifest):
        raise DataError(
            f"{manifest.path} holds documents without roles: traces come from a recipe whose sources have "
            "kind: traces, or from data.traces"
        )
    found = [read_lengths(manifest, part) for part in manifest.parts]
    documents, prompts = (np.concatenate(column) for column in zip(*found, strict=True))
    return TraceDataset(tokens, documents, prompts)


class TraceDataset:
    """Documents of prompt and completion, source after source. Made by open_traces.

    Pickled like TokenDataset: a copy has the lengths, and reads no file before it reads a document.
    """

    def __init__(self, tokens: TokenDataset, document_lengths: Ints, prompt_lengths: Ints) -> None:
        """`document_lengths` counts the tokens of each document, `prompt_lengths` those of its prompt."""
        self.tokens, self.manifest = tokens, tokens.manifest
        self.path, self.id = tokens.path, tokens.id
        self.num_documents, self.num_tokens = tokens.num_documents, tokens.num_tokens
        self.vocab_size, self.eos_id = tokens.vocab_size, tokens.eos_id
        self.source_documents: tuple[int, ...] = tuple(
            source["num_documents"] for source in tokens.manifest.content["sources"]
        )
        self.document_lengths, self.prompt_lengths = document_lengths, prompt_lengths
        document_lengths.flags.writeable = prompt_lengths.flags.writeable = False
        self._starts = np.concatenate([[0], np.cumsum(self.document_lengths)])
        self._keeps = tokens.verify == "once" and tokens.num_tokens * tokens.dtype.itemsize <= KEPT_BYTES

    def __repr__(self) -> str:
        return f"TraceDataset({str(self.path)!r}, id={self.id[:12]}, num_documents={self.num_documents})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TraceDataset, (self.tokens, self.document_lengths, self.prompt_lengths)

    def read_document(self, number: int) -> tuple[npt.NDArray[np.uint32], int]:
        """Return the tokens of a document, EOS id included, and how many of them are the prompt.

        Raise IndexError without such a document; ShardCorruptError names the bad file and chunk.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} is outside [0, {self.num_documents})")
        start, length = int(self._starts[number]), int(self.document_lengths[number])
        tokens = self._kept[start : start + length] if self._keeps else self.tokens.read(start, length)
        return tokens.astype(np.uint32), int(self.prompt_lengths[number])

    def prompt_keys(self) -> npt.NDArray[np.uint64]:
        """Return a number for each document, equal for equal prompts; reads all tokens."""
        found = np.empty(self.num_documents, np.uint64)
        begin = 0
        while begin < self.num_documents:
            start = int(self._starts[begin])
            end = max(begin + 1, int(np.searchsorted(self._starts, start + _AT_ONCE, side="right")) - 1)
            block = self.tokens.read(start, int(self._starts[end]) - start)
            for number in range(begin, end):
                first = int(self._starts[number]) - start
                prompt = block[first : first + int(self.prompt_lengths[number])].tobytes()
                found[number] = int.from_bytes(blake2b(prompt, digest_size=8).digest(), "little")
            begin = end
        return found

    @cached_property
    def _kept(self) -> npt.NDArray[Any]:
        return self.tokens.read(0, self.num_tokens)


@dataclass(frozen=True)
class Parting:
    """Each source's documents in its own order; the last ones are held out."""

    all_sizes: tuple[int, ...]
    num_held: tuple[int, ...]
    seed: int
    siblings: tuple[int, ...] = ()
    """Documents with the prompt of a held-out one, in order: other answers to the same question, of any
    source. Training on them would make the held-out loss too low."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return how many documents of each source are trained on."""
        left_out = map(len, self._siblings_of)
        return tuple(
            size - held - out for size, held, out in zip(self.all_sizes, self.num_held, left_out, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields, for the id of the order; without siblings, as versions before siblings did."""
        found = asdict(self)
        return found if self.siblings else {k: v for k, v in found.items() if k != "siblings"}

    @cached_property
    def _siblings_of(self) -> list[Ints]:
        """Return for each source the places of its siblings in its order, ascending."""
        found, first, out = [], 0, np.array(self.siblings, np.int64)
        for source, size in enumerate(self.all_sizes):
            mine = out[(out >= first) & (out < first + size)]
            order = self._document(source, np.arange(size if mine.size else 0, dtype=np.int64))
            found.append(np.flatnonzero(np.isin(order, mine)))
            first += size
        return found

    @property
    def held_out(self) -> Ints:
        parts = [
            self._document(source, np.arange(size - held, size, dtype=np.int64))
            for source, (size, held) in enumerate(zip(self.all_sizes, self.num_held, strict=True))
        ]
        return np.concatenate(parts)

    def training(self, items: Ints) -> Ints:
        """Return the documents of some items: their numbers among those trained on, source after source."""
        firsts = np.array([0, *accumulate(self.sizes)], np.int64)
        sources = np.searchsorted(firsts, items, side="right") - 1
        found = np.empty_like(items)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            # The k-th place without a sibling: before it lie the siblings that have at most k other places
            # before them.
            out = self._siblings_of[source]
            places = items[chosen] - firsts[source]
            places = places + np.searchsorted(out - np.arange(len(out)), places, side="right")
            found[chosen] = self._document(source, places)
        return found

    def _document(self, source: int, places: Ints) -> Ints:
        first = sum(self.all_sizes[:source])
        return first + visit(places, self.all_sizes[source], self.seed)


def hold_out(
    dataset: TraceDataset,
    num: int,
    seed: int,
    is_of_before: Callable[[Parting], bool] = lambda parting: False,
) -> Parting:
    """Hold out `num` documents of the dataset, of each source its share. Reads all tokens to find siblings.

    `is_of_before(parting)` is True if a run of an older version began with this parting, without siblings:
    the run keeps it. Raise UsageError if a source would have none left to train on.
    """
    sizes = dataset.source_documents
    found = Parting(sizes, divide(num, sizes), seed)
    if _leaves_some(found):
        if is_of_before(found):
            return found
        prompts, ours = dataset.prompt_keys(), np.zeros(dataset.num_documents, np.bool_)
        ours[found.held_out] = True
        siblings = np.isin(prompts, prompts[ours]) & ~ours
        found = replace(found, siblings=tuple(np.flatnonzero(siblings).tolist()))
        if _leaves_some(found):
            return found
    raise UsageError(
        f"data.validation_documents is {num}, but {dataset.path} has {dataset.num_documents} documents, "
        f"{len(found.siblings)} more of which share a prompt with those held out, and some of every source "
        "must be left to train on: lower it"
    )


def _leaves_some(parting: Parting) -> bool:
    return all(left > 0 for left, size in zip(parting.sizes, parting.all_sizes, strict=True) if size)
