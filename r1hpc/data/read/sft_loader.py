"""Give one rank batches of traces: complete documents, padded, with a mask of the tokens to learn.

    loader = TraceLoader(open_traces(path), global_batch_size=32, micro_batch_size=4, rank=1, world_size=4,
                         seed=0, pad_id=0, seq_len=256)
    batch = loader.batch(global_step)           # any step, in any order; no state to save

Sample s of the endless stream belongs to step s div global_batch_size and is document permute(s mod n, n,
key(seed, s div n)) of n (see order.py): every document once per epoch. If sources are mixed, mixture.py
orders them. Global batches are the same on any number of ranks.

A row holds one document or, with `packing`, several, which saves padding. Documents, their order, checksum
and loss tokens are the same for both, so the training is too. Document lengths alone decide the packed rows:
the longest first, each goes to the emptiest of as few rows of seq_len as needed (longest processing time
first: Graham, SIAM J. Appl. Math. 17, 1969). So rows are nearly equal, all ranks have equally many, and a
micro batch is as wide as its fullest row.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.sections import MixConfig
from r1hpc.data.format.manifest import digest
from r1hpc.data.read.loader import ReadAhead, window_checksum
from r1hpc.data.read.open_plan import AS_THE_RECIPE_SAYS, DocumentMixture, open_mixture
from r1hpc.data.read.order import DocumentPlan, Ints, RankShare
from r1hpc.data.read.sft_documents import Parting, TraceDataset

_LENGTH_MULTIPLE = 8
_MicroBatch = Sequence[Sequence[int]]
"""Rows of numbers of documents."""


@dataclass(frozen=True)
class Rows:
    """A micro batch; arrays of shape (rows, T), padded on the right with pad_id."""

    tokens: Ints
    loss_mask: npt.NDArray[np.bool_]
    """True where tokens[:, t] is a completion token, and so a target; the EOS id is one."""
    positions: Ints
    """From 0 in each document, and in the padding at a row's end."""


@dataclass(frozen=True)
class TraceBatch:
    """One rank's data of one optimizer step."""

    micro_batches: tuple[Rows, ...]
    """At most micro_batch_size rows each; equally many on every rank, each with equally many rows.

    One document per row: T is the longest of the global batch, rounded up to a multiple of 8, at most
    seq_len, the same on every rank.
    """
    sample_ids: Ints
    """(documents of this rank,), row after row: positions in the endless stream."""
    document_ids: Ints
    checksum: int
    """Sum over samples of the crc32c of id (int64) and unpadded tokens (uint32), little-endian.

    Summed over ranks it identifies the global batch, independent of the world size.
    """
    num_loss_tokens: int
    """Completion tokens of the global batch, over all ranks: the denominator of a token-mean loss."""
    num_tokens: int
    """Tokens of its documents, over all ranks."""
    num_positions: int
    """Computed positions of the global batch, padding included."""
    attended: int
    """Positions that each position attends to: T; packed: mean over tokens of their document's length."""


class TraceLoader:
    """Loads the batches of one rank. A background thread reads one step ahead unless `prefetch` is off."""

    def __init__(
        self,
        dataset: TraceDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_id: int,
        seq_len: int,
        packing: bool = False,
        prefetch: bool = True,
        parting: Parting | None = None,
        mix: MixConfig = AS_THE_RECIPE_SAYS,
        num_samples: int = 0,
    ) -> None:
        """Raise UsageError if the batch does not divide, a document is too long, or a mixture ends early.

        Args:
            packing: several documents per row, not one.
            parting: leaves documents out of the training; None: none.
            mix: how the run changes the weights.
            num_samples: of the whole run.
        """
        if pad_id < 0:
            raise UsageError(f"pad_id must be a token id, not {pad_id}")
        lengths = dataset.document_lengths
        longest = int(lengths.argmax())
        if lengths[longest] > seq_len:
            raise UsageError(
                f"data.seq_len is {seq_len}, but {(lengths > seq_len).sum():,} of {len(lengths):,} traces in "
                f"{dataset.path} are longer: the longest, document {longest}, has {lengths[longest]:,} "
                f"tokens with its EOS. Set data.seq_len={lengths[longest]} or more, or leave long ones out "
                "of the traces"
            )
        self.dataset, self.seq_len, self.pad_id = dataset, seq_len, pad_id
        self.share = RankShare(global_batch_size, micro_batch_size, rank, world_size)
        self.plan = open_document_plan(dataset, seed, global_batch_size, parting, mix, num_samples)
        self._parting, self._packing = parting, packing
        self._ahead = ReadAhead(self._read) if prefetch else None

    def order_id(self, plan: DocumentPlan | DocumentMixture) -> str:
        """Return the id of the loader's order with this plan."""
        return document_order_id(plan, self._parting)

    def batch(self, global_step: int) -> TraceBatch:
        """Return the batch of one step, counted from 0. A reading error is raised at its own step."""
        return self._ahead.take(global_step) if self._ahead else self._read(global_step)

    def documents_of(self, global_step: int) -> Ints:
        """Return the documents of the global batch, in the order of its samples."""
        first = global_step * self.share.global_batch_size
        found = self.plan.documents(np.arange(first, first + self.share.global_batch_size, dtype=np.int64))
        return found if self._parting is None else self._parting.training(found)

    def rows_of(self, documents: Ints) -> list[Rows]:
        """Return this rank's micro batches of some documents, each once over the ranks.

        Every rank has equally many with equally many rows; surplus rows are empty, without a loss.
        """
        lengths, prompts = self.dataset.document_lengths[documents], self.dataset.prompt_lengths[documents]
        world_size = self.share.world_size
        rows: list[list[int]] = [[number] for number in np.argsort(-lengths, kind="stable").tolist()]
        if self._packing:
            rows = pack(lengths, world_size, self.seq_len)
        rows += [[] for _ in range(-len(rows) % world_size)]
        dealt = deal(rows, self.share.micro_batch_size, self.share.rank, world_size)
        tokens = self._tokens(dealt, documents)
        return [
            lay_out(part, tokens, prompts, self.pad_id, width(part, lengths, self.seq_len)) for part in dealt
        ]

    def _tokens(self, dealt: Sequence[_MicroBatch], documents: Ints) -> dict[int, npt.NDArray[np.uint32]]:
        """Return the tokens of the documents in micro batches by their number there, row after row."""
        numbers = [number for rows in dealt for row in rows for number in row]
        return {number: self.dataset.read_document(int(documents[number]))[0] for number in numbers}

    def _read(self, global_step: int) -> TraceBatch:
        share, first = self.share, global_step * self.share.global_batch_size
        documents = self.documents_of(global_step)
        lengths = self.dataset.document_lengths[documents]
        prompts = self.dataset.prompt_lengths[documents]
        if self._packing:
            packed = pack(lengths, share.world_size, self.seq_len)
            ranks = [
                deal(packed, share.micro_batch_size, rank, share.world_size)
                for rank in range(share.world_size)
            ]
            dealt = ranks[share.rank]
            widths = [width(rows, lengths, self.seq_len) for rows in dealt]
            num_positions = sum(len(rows) * width(rows, lengths, self.seq_len) for rows in chain(*ranks))
            attended = round(float((lengths**2).sum() / lengths.sum()))
        else:
            dealt = share.sample_ids(0)[..., np.newaxis].tolist()
            attended = row_length(int(lengths.max()), self.seq_len)
            widths = [attended] * len(dealt)
            num_positions = share.global_batch_size * attended
        tokens = self._tokens(dealt, documents)
        numbers = list(tokens)
        return TraceBatch(
            micro_batches=tuple(
                lay_out(rows, tokens, prompts, self.pad_id, width)
                for rows, width in zip(dealt, widths, strict=True)
            ),
            sample_ids=first + np.array(numbers, np.int64),
            document_ids=documents[numbers],
            checksum=sum(window_checksum(first + number, document) for number, document in tokens.items()),
            num_loss_tokens=int((lengths - prompts).sum()),
            num_tokens=int(lengths.sum()),
            num_positions=num_positions,
            attended=attended,
        )


def document_order_id(plan: DocumentPlan | DocumentMixture, parting: Parting | None) -> str:
    """Return the id of the order of the documents trained on."""
    return plan.plan_hash if parting is None else digest({"plan": plan.plan_hash, **parting.to_json()})


def row_length(longest: int, seq_len: int) -> int:
    """Return the row length for `longest` tokens: a multiple of 8, which suits GPUs, at most seq_len."""
    return min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, seq_len)


def open_document_plan(
    dataset: TraceDataset,
    seed: int,
    global_batch_size: int,
    parting: Parting | None = None,
    mix: MixConfig = AS_THE_RECIPE_SAYS,
    num_samples: int = 0,
) -> DocumentPlan | DocumentMixture:
    """Return the order of a dataset's documents: its recipe's or run's mixture, or all alike.

    With a parting, it orders the documents trained on, by their place among these. Raise UsageError if the
    run's schedule names other sources than there are, or a mixture ends before `num_samples`, those of the
    whole run.
    """
    sizes = dataset.source_documents if parting is None else parting.sizes
    mixture = open_mixture(dataset.manifest, mix, "documents", sizes, global_batch_size, seed, num_samples)
    if mixture is None:
        return DocumentPlan(dataset.id, sum(sizes), seed)
    return DocumentMixture(dataset.id, mixture)


def width(rows: _MicroBatch, lengths: Ints, seq_len: int) -> int:
    """Return the width of a micro batch: that of its fullest row."""
    return row_length(max(1, *(int(lengths[row].sum()) for row in map(list, rows))), seq_len)


def lay_out(
    rows: _MicroBatch,
    tokens: Mapping[int, npt.NDArray[np.uint32]],
    prompts: Ints,
    pad_id: int,
    width: int,
) -> Rows:
    """Return a micro batch of rows `width` wide. Arguments are by the number of a document in `rows`."""
    shape = (len(rows), width)
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.bool_)
    positions = np.zeros(shape, np.int64)
    for line, row in enumerate(rows):
        end = 0
        for number in row:
            begin, end = end, end + len(tokens[number])
            ids[line, begin:end] = tokens[number]
            mask[line, begin + prompts[number] : end] = True
            positions[line, begin:end] = np.arange(end - begin)
        positions[line, end:] = np.arange(width - end)
    return Rows(ids, mask, positions)


def pack(lengths: Ints, multiple: int, capacity: int) -> list[list[int]]:
    """Pack documents of the given lengths (at most `capacity`) into rows, the fullest row first.

    Uses as few rows as this method allows, in a multiple of `multiple`; there are at least as many documents.
    No row is empty.
    """
    rows = -(-int(lengths.sum()) // (capacity * multiple)) * multiple
    while True:
        dealt = _dealt(lengths, rows)
        if lengths[dealt[0]].sum() <= capacity:
            return dealt
        rows += multiple


def deal(
    rows: Sequence[Sequence[int]], micro_batch_size: int, rank: int, world_size: int
) -> list[_MicroBatch]:
    """Return a rank's micro batches, of rows that are about equally full; world_size divides len(rows)."""
    at_once = micro_batch_size * world_size
    return [rows[start : start + at_once][rank::world_size] for start in range(0, len(rows), at_once)]


def _dealt(lengths: Ints, num_rows: int) -> list[list[int]]:
    """Deal the longest documents first to the emptiest row; return the rows, the fullest first."""
    heap = [(0, row) for row in range(num_rows)]
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for number in np.argsort(-lengths, kind="stable").tolist():
        fill, row = heap[0]
        rows[row].append(number)
        heapq.heapreplace(heap, (fill + int(lengths[number]), row))
    return [rows[row] for _, row in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]
