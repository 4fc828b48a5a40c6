"""Batches of one rank, step by step, with the next one read ahead.

    loader = BatchLoader(dataset, plan, global_batch_size=32, micro_batch_size=4, rank=1, world_size=4)
    batch = loader.batch(global_step)           # any step, in any order; no state to save

Step s holds samples [s * global_batch_size, (s + 1) * global_batch_size) whatever the world size is, so
that a run continues with identical global batches on another number of ranks.

Read one step ahead in a background thread, for loaders whose batches are pure functions of the step.

ahead = ReadAhead(read)             # read: step -> batch
batch = ahead.take(step)            # what the thread has read, if it was this step; then starts the next
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import UsageError
from r1hpc.data.read.order import RankShare
from r1hpc.data.read.reader import TokenDataset
from r1hpc.data.read.sampler import WindowPlan

_Batch = TypeVar("_Batch")


class ReadAhead(Generic[_Batch]):
    """At most one thread, reading step + 1. An error in it is raised at the step it belongs to."""

    def __init__(self, read: Callable[[int], _Batch]) -> None:
        self._read = read
        self._ahead: tuple[int, int, Future[_Batch]] | None = None

    def take(self, step: int) -> _Batch:
        """The batch of `step`; the next step is being read when this returns or raises."""
        try:
            future = self._take_future(step)
            return self._read(step) if future is None else future.result()
        finally:
            self._start(step + 1)

    def forget(self) -> None:
        """What is being read ahead is not wanted; it has ended when this returns."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == os.getpid():
            wait([ahead[2]])

    def _take_future(self, step: int) -> "Future[_Batch] | None":
        """What was read ahead, if it is this step's and was read by this process, not by a fork's parent."""
        ahead, self._ahead = self._ahead, None
        return ahead[2] if ahead is not None and ahead[:2] == (os.getpid(), step) else None

    def _start(self, step: int) -> None:
        future: Future[_Batch] = Future()
        self._ahead = (os.getpid(), step, future)
        threading.Thread(target=self._fulfil, args=(future, step), daemon=True, name="prefetch").start()

    def _fulfil(self, future: "Future[_Batch]", step: int) -> None:
        # Signals must reach the main thread: it is the one whose system calls they are meant to interrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            future.set_result(self._read(step))
        except BaseException as error:  # handed over, not handled: raised where the step asks for it
            future.set_exception(error)


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
        plan: WindowPlan,
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
        self.dataset, self.plan = dataset, plan
        self.share = RankShare(global_batch_size, micro_batch_size, rank, world_size)
        self._ahead = ReadAhead(self._read) if prefetch else None

    def batch(self, global_step: int) -> StepBatch:
        """The batch of one step. An error of the reading thread is raised here, at its own step."""
        return self._ahead.take(global_step) if self._ahead else self._read(global_step)

    def follow(self, plan: WindowPlan) -> None:
        """From the next batch on, the order of another plan of the same dataset."""
        if self._ahead:
            self._ahead.forget()
        self.plan = plan

    def order_id(self, plan: WindowPlan) -> str:
        """Names the order that the loader has with this plan."""
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
    """crc32c of the sample id (int64) followed by its tokens (uint32), little-endian."""
    crc = google_crc32c.value(sample_id.to_bytes(8, "little", signed=True))
    return int(google_crc32c.extend(crc, window.astype("<u4").tobytes()))
