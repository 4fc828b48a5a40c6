"""Batches of one rank, step by step, with the next one read ahead.

    loader = BatchLoader(dataset, plan, global_batch_size=32, micro_batch_size=4, rank=1, world_size=4)
    batch = loader.batch(global_step)           # any step, in any order; no state to save

Step s holds samples [s * global_batch_size, (s + 1) * global_batch_size) whatever the world size is, so
that a run continues with identical global batches on another number of ranks.
"""

import os
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.order import SamplePlan
from r1hpc.data.reader import TokenDataset


@dataclass(frozen=True)
class StepBatch:
    """What one rank consumes in one optimizer step."""

    tokens: npt.NDArray[np.int64]
    """Shape (gradient_accumulation_steps, micro_batch_size, seq_len + 1)."""
    sample_ids: npt.NDArray[np.int64]
    """Shape (gradient_accumulation_steps, micro_batch_size)."""
    checksum: int
    """Sum over samples of the crc32c of id (int64) and window (uint32), little-endian.

    Summed over ranks it names the global batch, independent of the world size.
    """


class BatchLoader:
    """The batches of one rank. One background thread reads one step ahead unless `prefetch` is off."""

    def __init__(
        self,
        dataset: TokenDataset,
        plan: SamplePlan,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        prefetch: bool = True,
    ) -> None:
        """Raise UsageError when the batch does not divide, or the plan is another dataset's."""
        if (plan.dataset_id, plan.num_tokens) != (dataset.id, dataset.num_tokens):
            raise UsageError(
                f"the plan is for dataset {plan.dataset_id}, not for {dataset.id} at {dataset.path}"
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is outside a world of {world_size}")
        if (
            micro_batch_size < 1
            or global_batch_size < 1
            or global_batch_size % (micro_batch_size * world_size)
        ):
            raise UsageError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x {world_size} ranks; change one of the three"
            )
        self.dataset, self.plan = dataset, plan
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._prefetch = prefetch
        self._ahead: tuple[int, int, Future[StepBatch]] | None = None

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def rank_samples(self, global_step: int) -> npt.NDArray[np.int64]:
        """Sample ids of this rank, shape (gradient_accumulation_steps, micro_batch_size).

        Micro step a of rank r holds the ids step * GBS + a * micro * world + r * micro + j.
        """
        shape = (self.gradient_accumulation_steps, self.world_size, self.micro_batch_size)
        ids = np.arange(self.global_batch_size, dtype=np.int64).reshape(shape)[:, self.rank]
        return ids + global_step * self.global_batch_size

    def batch(self, global_step: int) -> StepBatch:
        """The batch of one step. An error of the reading thread is raised here, at its own step."""
        try:
            return self._take_ahead(global_step) or self._read(global_step)
        finally:
            if self._prefetch:
                self._start(global_step + 1)

    def _take_ahead(self, global_step: int) -> StepBatch | None:
        """What was read ahead, if it is this step's and was read by this process, not by a fork's parent."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[:2] != (os.getpid(), global_step):
            return None
        return ahead[2].result()

    def _start(self, global_step: int) -> None:
        future: Future[StepBatch] = Future()
        self._ahead = (os.getpid(), global_step, future)
        threading.Thread(
            target=self._fulfil, args=(future, global_step), daemon=True, name="prefetch"
        ).start()

    def _fulfil(self, future: Future[StepBatch], global_step: int) -> None:
        # Signals must reach the main thread: it is the one whose system calls they are meant to interrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            future.set_result(self._read(global_step))
        except BaseException as error:  # handed over, not handled: raised where the step asks for it
            future.set_exception(error)

    def _read(self, global_step: int) -> StepBatch:
        ids = self.rank_samples(global_step)
        length = self.plan.seq_len + 1
        tokens = np.empty((*ids.shape, length), dtype=np.int64)
        rows = tokens.reshape(-1, length)
        checksum = 0
        starts = self.plan.window_starts(ids).ravel().tolist()
        for row, (sample, start) in enumerate(zip(ids.ravel().tolist(), starts, strict=True)):
            window = self.dataset.read(start, length)
            rows[row] = window
            checksum += window_checksum(sample, window)
        return StepBatch(tokens, ids, checksum)


def window_checksum(sample_id: int, window: npt.NDArray[np.integer]) -> int:
    """crc32c of the sample id (int64) followed by its tokens (uint32), little-endian."""
    crc = google_crc32c.value(sample_id.to_bytes(8, "little", signed=True))
    return int(google_crc32c.extend(crc, window.astype("<u4").tobytes()))
