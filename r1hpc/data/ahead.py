"""Read one step ahead in a background thread, for loaders whose batches are pure functions of the step.

ahead = ReadAhead(read)             # read: step -> batch
batch = ahead.take(step)            # what the thread has read, if it was this step; then starts the next
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

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
