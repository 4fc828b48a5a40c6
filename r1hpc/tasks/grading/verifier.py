"""Judge answers in a separate process, so that no answer can stop the trainer.

This is the trainer's side, used by tasks/rewards.py; worker.py runs in the process and judges.py has the
judges. Custom reward terms are computed there too. One process is started and reused. An answer that exceeds
its time is wrong, and the process is killed and replaced. Equal questions in one call are judged once.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.base.errors import R1hpcError
from r1hpc.tasks.grading.judges import JUDGES, OWN_SCORE, OWN_VERDICT
from r1hpc.tasks.sandbox.process import DiedError, TimedOutError, WorkerProcess, wait_for_own

_WORKER = "r1hpc.tasks.grading.worker"
_START_LIMIT_S = 120.0
"""Imports from a network file system under load; judging has not begun."""
_MAX_CHUNK = 512
_MOST_FAILURES = 256
"""Consecutive failures of custom code before the run aborts: then the completions are not the cause."""
_MOST_NOTED = 20
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Question:
    """An answer's text, and the item's answer and metadata to judge it by."""

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
    failures: int = 0
    """Answers on which custom code failed, or a library was refused a forbidden act; wrong."""
    restarts: int = 0
    slowest_s: float = 0.0
    """Longest wait for the process, including killing but not starting it."""

    @staticmethod
    def joined(parts: Sequence["VerifierStats"]) -> "VerifierStats":
        whole = VerifierStats(slowest_s=max(part.slowest_s for part in parts))
        for name in ("checked", "refused", "timeouts", "crashes", "failures", "restarts"):
            setattr(whole, name, sum(getattr(part, name) for part in parts))
        return whole


class StopAsked(Exception):  # noqa: N818 - nothing went wrong
    """A stop was requested while answers were judged."""


class Verifier:
    """See the module. Not thread-safe: one per thread."""

    def __init__(self, judge: str, settings: Mapping[str, Any], timeout_s: float) -> None:
        self.stats = VerifierStats()
        self._arguments = [judge, json.dumps(dict(settings))]
        self._timeout_s = timeout_s
        self._judge = JUDGES[judge]
        self._own = settings.get("spec") if judge in (OWN_VERDICT, OWN_SCORE) else None
        """The name of the custom code that judges; None: a built-in judge does."""
        self.sentences: list[str] = []
        """How custom code failed, and how a built-in judge gave an answer up; each kind once."""
        self.failed: list[bool] = []
        """True for each answer of the last call on which custom code failed or a judge gave up."""
        self._failed_in_a_row = 0
        self._chunk = _MAX_CHUNK if self._judge.bounded else 1
        self._prepared: object = None
        self._worker: WorkerProcess | None = WorkerProcess(_WORKER, self._arguments)
        self._ready = False

    @property
    def is_own(self) -> bool:
        """True if custom code judges."""
        return self._own is not None

    def check(self, questions: Sequence[Question], should_stop: ShouldStop = lambda: False) -> list[bool]:
        """Return whether each answer is right, in order. Raises as `values` does."""
        return [bool(value) for value in self.values(questions, should_stop)]

    def values(
        self, questions: Sequence[Question], should_stop: ShouldStop = lambda: False
    ) -> list[bool | float | None]:
        """Return the judge's value for each answer, in order; None if it gives none.

        `should_stop` is called before each request to the process; a slow judge gets one request an answer.
        Raise StopAsked if it returned true, R1hpcError if custom code failed on _MOST_FAILURES answers in a
        row.
        """
        # Completions of one item share its metadata: the object identifies the item, cheaper than its text.
        keys = [(question.text, question.answer, id(question.metadata)) for question in questions]
        wire = {key: [*key[:2], dict(each.metadata)] for key, each in zip(keys, questions, strict=True)}
        readable = [key for key in wire if len(key[0]) <= self._judge.max_characters]
        verdicts: dict[object, bool | float | None] = dict.fromkeys(wire)
        failed = set()
        for first in range(0, len(readable), self._chunk):
            if should_stop():
                raise StopAsked
            chunk = readable[first : first + self._chunk]
            said = self._judged([wire[key] for key in chunk])
            failed |= {key for key, each in zip(chunk, said, strict=True) if isinstance(each, dict)}
            verdicts.update(zip(chunk, map(self._understood, said), strict=True))
        self.failed = [key in failed for key in keys]
        self.stats.checked += len(keys)
        self.stats.refused += sum(verdicts[key] is None for key in keys)
        return [verdicts[key] for key in keys]

    def close(self) -> None:
        """End the process; its pid is gone when this returns."""
        if self._worker is not None:
            self._worker.stop()
            self._worker, self._ready, self._prepared = None, False, None

    def _understood(self, said: Any) -> bool | float | None:
        """Return a verdict, and note the first failure of each kind.

        It is None if custom code failed, False if a built-in judge gave up.
        """
        if not isinstance(said, dict):
            self._failed_in_a_row = 0
            return said  # type: ignore[no-any-return]
        if said["error"] not in self.sentences and len(self.sentences) < _MOST_NOTED:
            self.sentences.append(said["error"])
        if not self._own:
            self.stats.failures += "act" in said
            return False
        self.stats.failures += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _MOST_FAILURES:
            raise R1hpcError(f"{said['error']}; so on {_MOST_FAILURES} completions in a row")
        return None

    def _judged(self, chunk: list[list[Any]]) -> list[Any]:
        """Return the verdicts of a chunk; if it fails, judge each of its questions alone."""
        try:
            return self._ask(chunk)
        except (TimedOutError, DiedError) as failure:
            if len(chunk) > 1:
                return [verdict for question in chunk for verdict in self._judged([question])]
            return [self._after_failure(chunk, failure)]

    def _after_failure(self, chunk: list[list[Any]], failure: Exception) -> Any:
        """Judge a question that failed alone. Retry once if the process ended: others may have ended it."""
        if isinstance(failure, DiedError):
            try:
                return self._ask(chunk)[0]
            except DiedError:
                self.stats.crashes += 1
                return self._gave_up("ended its process (os._exit, or out of memory)")
            except TimedOutError:
                pass
        self.stats.timeouts += 1
        return self._gave_up(f"took over {self._timeout_s:g} s (reward.timeout_s)")

    def _gave_up(self, how: str) -> dict[str, str]:
        return {"error": f"{self._own or f'judge {self._arguments[0]}'} {how}"}

    def _ask(self, chunk: list[list[Any]]) -> list[Any]:
        worker = self._running()
        began = None
        try:
            self._prepare(worker, chunk[0][2])
            began = time.monotonic()
            verdicts = worker.ask(chunk, self._timeout_s)
            if not isinstance(verdicts, list) or [*map(_is_one, verdicts)] != [True] * len(chunk):
                raise DiedError("it sent something that is not a list of verdicts")
            return verdicts
        except BaseException:  # also an interrupt leaves a process whose next reply would be the wrong one
            self.close()
            raise
        finally:
            if began is not None:
                self.stats.slowest_s = max(self.stats.slowest_s, time.monotonic() - began)

    def _prepare(self, worker: WorkerProcess, metadata: Any) -> None:
        """Prepare the judge for an item, outside an answer's time limit."""
        if not self._judge.prepares or metadata == self._prepared:
            return
        try:
            worker.ask({"prepare": metadata}, _START_LIMIT_S)
        except TimedOutError:
            raise R1hpcError(f"the verifier took over {_START_LIMIT_S:g} s to prepare {metadata}") from None
        self._prepared = metadata

    def _running(self) -> WorkerProcess:
        if self._worker is None:
            self._worker = WorkerProcess(_WORKER, self._arguments)
            self.stats.restarts += 1
        if not self._ready:
            if self._own:
                wait_for_own(self._worker, self._own)
            else:
                self._worker.wait_ready(_START_LIMIT_S)
            self._ready = True
        return self._worker


def _is_one(verdict: Any) -> bool:
    """True for a verdict that worker.py sends: custom code may have written to its pipe."""
    if isinstance(verdict, dict):
        return isinstance(verdict.get("error"), str)
    return verdict is None or (isinstance(verdict, bool | float) and math.isfinite(verdict))
