"""Give one rank batches of traces: complete documents, padded, with a mask of the tokens to learn.

    loader = TraceLoader(open_traces(path), global_batch_size=32, micro_batch_size=4, rank=1, world_size=4,
                         seed=0, pad_id=0, seq_len=256)
    batch = loader.batch(global_step)           # any step, in any order; no state to save

A row holds one document here, several in packed_loader.py. Sample s of the endless stream belongs to step s
div global_batch_size and is document permute(s mod n, n, key(seed, s div n)) of n: every document once per
epoch, with the same global batches on any number of ranks (see order.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.sections import MixConfig
from r1hpc.data.format.manifest import digest
from r1hpc.data.format.mix import MixRecipe
from r1hpc.data.read.loader import ReadAhead, window_checksum
from r1hpc.data.read.order import DocumentPlan, RankShare
from r1hpc.data.read.sampler import DocumentMixture, open_mixture, recipe_mix
from r1hpc.data.read.sft_documents import Parting, TraceDataset

_LENGTH_MULTIPLE = 8
_AS_THE_RECIPE_SAYS = MixConfig()
BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class TraceBatch:
    """One rank's data of one optimizer step."""

    tokens: npt.NDArray[np.int64]
    """Shape (gradient_accumulation_steps, micro_batch_size, T), padded on the right with pad_id.

    T is the longest document of the global batch, rounded up to a multiple of 8, at most seq_len: the same
    on every rank.
    """
    loss_mask: npt.NDArray[np.bool_]
    """Same shape. True where tokens[..., t] is a completion token, and so a target; the EOS id is one."""
    sample_ids: npt.NDArray[np.int64]
    """Shape (gradient_accumulation_steps, micro_batch_size): positions in the endless stream."""
    document_ids: npt.NDArray[np.int64]
    """Same shape as sample_ids: the document of each row."""
    checksum: int
    """Sum over samples of the crc32c of id (int64) and unpadded tokens (uint32), little-endian.

    Summed over ranks it identifies the global batch, independent of the world size.
    """
    num_loss_tokens: int
    """Completion tokens of the global batch, over all ranks: the denominator of a token-mean loss."""
    num_tokens: int
    """Tokens of its documents, over all ranks."""
    world_size: int

    @property
    def micro_batches(self) -> tuple["Rows", ...]:
        return tuple(Rows(*each) for each in zip(self.tokens, self.loss_mask, strict=True))

    @property
    def num_positions(self) -> int:
        """Return the computed positions of the global batch, padding included."""
        return self.world_size * self.tokens.size

    @property
    def attended(self) -> int:
        """Return the positions that each position attends to."""
        return int(self.tokens.shape[-1])


@dataclass(frozen=True)
class Rows:
    """A micro batch; arrays of shape (rows, T)."""

    tokens: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    positions: npt.NDArray[np.int64] | None = None
    """From 0 in each document, and in the padding at a row's end; None: each row is one document."""


class DocumentLoader(ABC, Generic[BatchT]):
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
        prefetch: bool = True,
        parting: Parting | None = None,
        mix: MixConfig = _AS_THE_RECIPE_SAYS,
        num_samples: int = 0,
    ) -> None:
        """Raise UsageError if the batch does not divide, a document is too long, or a mixture ends early.

        Args:
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
        self._parting = parting
        self._ahead = ReadAhead(self._read) if prefetch else None

    @property
    def plan_hash(self) -> str:
        """Return a hash of the order: dataset id, seed, weights, held-out documents and algorithm version."""
        return self.order_id(self.plan)

    def order_id(self, plan: DocumentPlan | DocumentMixture) -> str:
        """Return the id of the loader's order with this plan."""
        return document_order_id(plan, self._parting)

    def batch(self, global_step: int) -> BatchT:
        """Return the batch of one step, counted from 0. A reading error is raised at its own step.

        Raises:
            ShardCorruptError: names the file and chunk that cannot be trusted.
        """
        return self._ahead.take(global_step) if self._ahead else self._read(global_step)

    def documents_of(self, global_step: int) -> npt.NDArray[np.int64]:
        """Return the documents of the global batch, in the order of its samples."""
        first = global_step * self.share.global_batch_size
        found = self.plan.documents(np.arange(first, first + self.share.global_batch_size, dtype=np.int64))
        return found if self._parting is None else self._parting.training(found)

    @abstractmethod
    def _read(self, global_step: int) -> BatchT: ...


class TraceLoader(DocumentLoader[TraceBatch]):
    """Loads one document per row."""

    def _read(self, global_step: int) -> TraceBatch:
        first = global_step * self.share.global_batch_size
        every = self.documents_of(global_step)
        ids = self.share.sample_ids(global_step)
        documents = every[ids - first]
        lengths, prompts = self.dataset.document_lengths, self.dataset.prompt_lengths
        width = row_length(int(lengths[every].max()), self.seq_len)
        tokens = np.full((*ids.shape, width), self.pad_id, dtype=np.int64)
        checksum = 0
        rows = zip(tokens.reshape(ids.size, -1), ids.flat, documents.flat, strict=True)
        for row, sample, document in rows:
            found, _ = self.dataset.read_document(int(document))
            row[: len(found)] = found
            checksum += window_checksum(int(sample), found)
        begins, ends, positions = prompts[documents], lengths[documents], np.arange(width)
        mask = (positions >= begins[..., None]) & (positions < ends[..., None])
        return TraceBatch(
            tokens=tokens,
            loss_mask=mask,
            sample_ids=ids,
            document_ids=documents,
            checksum=checksum,
            num_loss_tokens=int((lengths[every] - prompts[every]).sum()),
            num_tokens=int(lengths[every].sum()),
            world_size=self.share.world_size,
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
    mix: MixConfig = _AS_THE_RECIPE_SAYS,
    num_samples: int = 0,
) -> DocumentPlan | DocumentMixture:
    """Return the order of a dataset's documents: its recipe's or run's mixture, or all alike.

    With a parting, it orders the documents trained on, by their place among these.

    Args:
        num_samples: of the whole run; a mixture that ends before is refused.

    Raises:
        UsageError: the run's schedule names other sources than there are, or the mixture ends too early.
    """
    sizes = dataset.source_documents if parting is None else parting.sizes
    recipe = recipe_mix(dataset.tokens.manifest)
    if recipe is None and not mix.is_used:
        return DocumentPlan(dataset.id, sum(sizes), seed)
    sources = dataset.tokens.manifest.content["sources"]
    mixture = open_mixture(
        recipe or MixRecipe(by="documents"),
        sources,
        mix,
        of="documents",
        sizes=sizes,
        batch=global_batch_size,
        seed=seed,
    )
    mixture.check_reaches(num_samples)
    return DocumentMixture(dataset.id, mixture)
