"""Give one rank of stage sft batches with several complete documents per row, to save padding.

    loader = PackedLoader(open_traces(path), global_batch_size=32, ...)      # as TraceLoader
    for rows in loader.batch(global_step).micro_batches: ...

The documents of a step, their order, checksum and loss tokens are those of TraceLoader, so the training is
the same. Document lengths alone decide the rows: the longest first, each goes to the emptiest of as few rows
of seq_len as needed (longest processing time first: Graham, SIAM J. Appl. Math. 17, 1969). So rows are nearly
equal, all ranks have equally many, and a micro batch is as wide as its fullest row.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r1hpc.data.read.loader import window_checksum
from r1hpc.data.read.sft_documents import TraceDataset
from r1hpc.data.read.sft_loader import DocumentLoader, Rows, row_length

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedBatch:
    """One rank's data of one optimizer step. Fields as in TraceBatch unless noted."""

    micro_batches: tuple[Rows, ...]
    """At most micro_batch_size rows each; equally many on every rank, each with equally many rows."""
    sample_ids: Ints
    """(documents of this rank,), row after row."""
    document_ids: Ints
    checksum: int
    num_loss_tokens: int
    num_tokens: int
    num_positions: int
    attended: int
    """Mean over tokens of the length of each token's document."""


class PackedLoader(DocumentLoader[PackedBatch]):
    """Loads several documents per row."""

    def _read(self, global_step: int) -> PackedBatch:
        share = self.share
        documents = self.documents_of(global_step)
        lengths = self.dataset.document_lengths[documents]
        prompts = self.dataset.prompt_lengths[documents]
        rows = pack(lengths, share.world_size, self.seq_len)
        ranks = [
            deal(rows, share.micro_batch_size, rank, share.world_size) for rank in range(share.world_size)
        ]
        mine = [number for rows in ranks[share.rank] for row in rows for number in row]
        first = global_step * share.global_batch_size
        tokens = {number: self.dataset.read_document(int(documents[number]))[0] for number in mine}
        return PackedBatch(
            micro_batches=tuple(
                lay_out(rows, tokens, prompts, self.pad_id, width(rows, lengths, self.seq_len))
                for rows in ranks[share.rank]
            ),
            sample_ids=first + np.array(mine, np.int64),
            document_ids=documents[mine],
            checksum=sum(window_checksum(first + number, tokens[number]) for number in mine),
            num_loss_tokens=int((lengths - prompts).sum()),
            num_tokens=int(lengths.sum()),
            num_positions=sum(
                len(rows) * width(rows, lengths, self.seq_len)
                for micro_batches in ranks
                for rows in micro_batches
            ),
            attended=round(float((lengths**2).sum() / lengths.sum())),
        )


def rows_of(
    dataset: TraceDataset,
    documents: Ints,
    *,
    packing: bool,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    seq_len: int,
    pad_id: int,
) -> list[Rows]:
    """Return a rank's micro batches of some documents, each once over the ranks: one per row, or packed.

    Every rank has equally many with equally many rows; surplus rows are empty, without a loss.
    """
    lengths, prompts = dataset.document_lengths[documents], dataset.prompt_lengths[documents]
    rows: list[list[int]] = [[number] for number in np.argsort(-lengths, kind="stable").tolist()]
    if packing:
        rows = pack(lengths, world_size, seq_len)
    rows += [[] for _ in range(-len(rows) % world_size)]
    tokens = {
        number: dataset.read_document(int(documents[number]))[0]
        for row in rows[rank::world_size]
        for number in row
    }
    return [
        lay_out(mine, tokens, prompts, pad_id, width(mine, lengths, seq_len))
        for mine in deal(rows, micro_batch_size, rank, world_size)
    ]


def width(rows: Sequence[Sequence[int]], lengths: Ints, seq_len: int) -> int:
    """Return the width of a micro batch: that of its fullest row."""
    return row_length(max(1, *(int(lengths[row].sum()) for row in map(list, rows))), seq_len)


def lay_out(
    rows: Sequence[Sequence[int]],
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
        if max(fill for fill, _ in dealt) <= capacity:
            return [row for _, row in sorted(dealt, key=lambda entry: -entry[0])]
        rows += multiple


def deal(
    rows: Sequence[Sequence[int]], micro_batch_size: int, rank: int, world_size: int
) -> list[Sequence[Sequence[int]]]:
    """Return a rank's micro batches, of rows that are about equally full; world_size divides len(rows)."""
    at_once = micro_batch_size * world_size
    return [rows[start : start + at_once][rank::world_size] for start in range(0, len(rows), at_once)]


def _dealt(lengths: Ints, num_rows: int) -> list[tuple[int, list[int]]]:
    """Deal the longest documents first to the emptiest row; return the sum and the documents of each row."""
    heap: list[tuple[int, int]] = [(0, row) for row in range(num_rows)]
    rows: list[tuple[int, list[int]]] = [(0, []) for _ in range(num_rows)]
    for number in np.argsort(-lengths, kind="stable").tolist():
        fill, row = heapq.heappop(heap)
        fill += int(lengths[number])
        rows[row] = fill, [*rows[row][1], number]
        heapq.heappush(heap, (fill, row))
    return rows
