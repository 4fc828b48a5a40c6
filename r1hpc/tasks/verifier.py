"""Answers in, verdicts out; whatever an answer does to its judge, the trainer goes on.

    with Verifier("countdown", {}, timeout_s=2.0) as verifier:
        verifier.check([Question("3*7+12", "3*7+12", {"numbers": [3, 7, 12], "target": 33})])   # [True]

One process, started once and used again. An answer that takes longer than its time is wrong, and the process
is killed and replaced. Equal questions of one call are judged once.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from r1hpc.base.errors import R1hpcError
from r1hpc.tasks.judges import JUDGES
from r1hpc.tasks.process import DiedError, TimedOutError, WorkerProcess

_START_LIMIT_S = 120.0
"""Imports from a network file system under load; judging has not begun."""
_MAX_CHUNK = 512


@dataclass(frozen=True)
class Question:
    """An answer's text beside what is asked of it."""

    text: str
    answer: str
    metadata: Mapping[str, Any]


@dataclass
class VerifierStats:
    """Counts since the start."""

    checked: int = 0
    refused: int = 0
    """Too long or unreadable; wrong."""
    timeouts: int = 0
    crashes: int = 0
    """Answers that ended the process twice; wrong."""
    restarts: int = 0
    slowest_s: float = 0.0
    """Longest wait for the process, killing it included, starting it not."""


class Verifier:
    """See the module. Not thread-safe: one per thread."""

    def __init__(self, judge: str, settings: Mapping[str, Any], timeout_s: float) -> None:
        self.stats = VerifierStats()
        self._arguments = [judge, json.dumps(dict(settings))]
        self._timeout_s = timeout_s
        self._judge = JUDGES[judge]
        self._chunk = _MAX_CHUNK if self._judge.bounded else 1
        self._prepared: object = None
        self._worker: WorkerProcess | None = self._started()
        self._ready = False

    def check(self, questions: Sequence[Question]) -> list[bool]:
        """Whether each answer is right, in order."""
        # Completions of one item share its metadata: the object says which item, for less than its text.
        keys = [(question.text, question.answer, id(question.metadata)) for question in questions]
        wire = dict(zip(keys, map(_wire, questions), strict=True))
        readable = [key for key in wire if len(key[0]) <= self._judge.max_characters]
        verdicts: dict[object, bool | None] = dict.fromkeys(wire)
        for first in range(0, len(readable), self._chunk):
            chunk = readable[first : first + self._chunk]
            verdicts.update(zip(chunk, self._judged([wire[key] for key in chunk]), strict=True))
        self.stats.checked += len(keys)
        self.stats.refused += sum(verdicts[key] is None for key in keys)
        return [bool(verdicts[key]) for key in keys]

    def close(self) -> None:
        """End the process; its pid is gone when this returns."""
        if self._worker is not None:
            self._worker.stop()
            self._worker, self._ready, self._prepared = None, False, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judged(self, chunk: list[list[Any]]) -> list[bool | None]:
        """Verdicts of a chunk; where it fails, of each of its questions alone."""
        try:
            return self._ask(chunk)
        except (TimedOutError, DiedError) as failure:
            if len(chunk) > 1:
                return [verdict for question in chunk for verdict in self._judged([question])]
            return [self._failed(chunk, failure)]

    def _failed(self, chunk: list[list[Any]], failure: Exception) -> bool | None:
        """A question that failed alone. A process that ended may have been ended by others: once more."""
        if isinstance(failure, DiedError):
            try:
                return self._ask(chunk)[0]
            except DiedError:
                self.stats.crashes += 1
                return False
            except TimedOutError:
                pass
        self.stats.timeouts += 1
        return False

    def _ask(self, chunk: list[list[Any]]) -> list[bool | None]:
        worker = self._running()
        began = None
        try:
            self._prepare(worker, chunk[0][2])
            began = time.monotonic()
            verdicts: list[bool | None] = worker.ask(chunk, self._timeout_s)
            return verdicts
        except BaseException:  # an interrupt, too, leaves a process whose next reply would be the wrong one
            self.close()
            raise
        finally:
            if began is not None:
                self.stats.slowest_s = max(self.stats.slowest_s, time.monotonic() - began)

    def _prepare(self, worker: WorkerProcess, metadata: Any) -> None:
        """Outside an answer's time limit, whatever the judge must do once for an item."""
        if not self._judge.prepares or metadata == self._prepared:
            return
        try:
            worker.ask({"prepare": metadata}, _START_LIMIT_S)
        except TimedOutError:
            raise R1hpcError(f"the verifier took over {_START_LIMIT_S:g} s to prepare {metadata}") from None
        self._prepared = metadata

    def _started(self) -> WorkerProcess:
        return WorkerProcess("r1hpc.tasks.worker", self._arguments)

    def _running(self) -> WorkerProcess:
        if self._worker is None:
            self._worker = self._started()
            self.stats.restarts += 1
        if not self._ready:
            self._worker.wait_ready(_START_LIMIT_S)
            self._ready = True
        return self._worker


def _wire(question: Question) -> list[Any]:
    return [question.text, question.answer, dict(question.metadata)]
