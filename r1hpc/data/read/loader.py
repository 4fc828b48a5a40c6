"""Give one rank its batches of windows, step by step, with the next step's read ahead. Traces: sft_loader.py.

    loader = BatchLoader(dataset, plan, global_batch_size=32, micro_batch_size=4, rank=1, world_size=4)
    batch = loader.batch(global_step)           # any step, in any order; no state to save

Step s holds samples [s * global_batch_size, (s + 1) * global_batch_size) for any world size, so a run
continues with identical global batches on another number of ranks. ReadAhead reads the next step in a
background thread, for batches that are pure functions of the step:

    ahead = ReadAhead(read)             # read: step -> batch
    batch = ahead.take(step)            # the batch read ahead, if it is this step's; then starts the next
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.read.open_plan import WindowPlan
from r1hpc.data.read.order import RankShare
from r1hpc.data.read.reader import TokenDataset

_Batch = TypeVar("_Batch")


class ReadAhead(Generic[_Batch]):
    """Reads step + 1 in at most one thread. Its error is raised at the step it belongs to."""

    def __init__(self, read: Callable[[int], _Batch]) -> None:
        self._read = read
        self._ahead: tuple[int, int, Future[_Batch]] | None = None

    def take(self, step: int) -> _Batch:
        """Return the batch of `step`; the next step is being read when this returns or raises."""
        ahead, self._ahead = self._ahead, None
        try:
            # What was read ahead, if it is this step's and this process read it (not a fork's parent).
            if ahead is not None and ahead[:2] == (os.getpid(), step):
                return ahead[2].result()
            return self._read(step)
        finally:
            future: Future[_Batch] = Future()
            self._ahead = (os.getpid(), step + 1, future)
            after = (future, step + 1)
            threading.Thread(target=self._fulfil, args=after, daemon=True, name="prefetch").start()

    def _fulfil(self, future: "Future[_Batch]", step: int) -> None:
        # Signals must reach the main thread, whose system calls they interrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            future.set_result(self._read(step))
        except BaseException as error:  # raised when its step is taken
            future.set_exception(error)


@dataclass(frozen=True)
class StepBatch:
    """One rank's data of one optimizer step."""

    tokens: npt.NDArray[np.int64]
    """Shape (gradient_accumulation_steps, micro_batch_size, seq_len + 1)."""
    sample_ids: npt.NDArray[np.int64]
    """Shape (gradient_accumulation_steps, micro_batch_size)."""
    checksum: int
    """Sum over samples of the crc32c of id (int64) and window (uint32), little-endian.

    Summed over ranks it identifies the global batch, independent of the world size.
    """


class BatchLoader:
    """The batches of one rank. One background thread reads one step ahead unless `prefetch` is off."""

    def __init__(
        self,
        dataset: TokenDataset,
        plan: WindowPlan,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        prefetch: bool = True,
    ) -> None:
        """Raise UsageError if the batch does not divide, or the plan is another dataset's."""
        if (plan.dataset_id, plan.num_tokens) != (dataset.id, dataset.num_tokens):
            raise UsageError(
                f"the plan is for dataset {plan.dataset_id}, not for {dataset.id} at {dataset.path}"
            )
        self.dataset, self.plan = dataset, plan
        self.share = RankShare(global_batch_size, micro_batch_size, rank, world_size)
        self._ahead = ReadAhead(self._read) if prefetch else None

    def batch(self, global_step: int) -> StepBatch:
        """Return the batch of one step. An error of the reading thread is raised here, at its own step."""
        return self._ahead.take(global_step) if self._ahead else self._read(global_step)

    def order_id(self, plan: WindowPlan) -> str:
        """Return the id of the loader's order with this plan."""
        return plan.plan_hash

    def _read(self, global_step: int) -> StepBatch:
        ids = self.share.sample_ids(global_step)
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
    """Return the crc32c of the sample id (int64) followed by its tokens (uint32), little-endian."""
    crc = google_crc32c.value(sample_id.to_bytes(8, "little", signed=True))
    return int(google_crc32c.extend(crc, window.astype("<u4").tobytes()))
