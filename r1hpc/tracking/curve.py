"""The curve of a run as its trackers show it, while it grows: every step once, in ascending order.

    curve = Curve(run, attempt=2)
    curve.newer()        # [] until attempt 2 has taken a step; then all that lasted; later, what is new

An attempt that resumes from a checkpoint takes the steps after it again. Which of the steps before lasted is
known once it has taken its first: so nothing is given out earlier.
"""

from collections.abc import Iterator, Sequence

from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.metrics import Step, fold_steps, follow_steps


class Curve:
    """The steps that lasted up to an attempt, then those that it takes."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._run = run
        self._read = follow_steps(run)
        self._attempt = attempt
        self._waiting: list[Step] | None = []
        """What earlier attempts took; None once it has been given out."""
        self._last = 0

    def newer(self) -> list[Step]:
        """The steps that were not given out yet."""
        # A newer attempt has trackers of its own.
        steps = [step for step in self._whole_file() if step.attempt <= self._attempt]
        if self._waiting is None:
            return self._ascending([step for step in steps if step.attempt == self._attempt])
        self._waiting += steps
        if not any(step.attempt == self._attempt for step in steps):
            return []
        return self._what_lasted()

    def rest(self) -> list[Step]:
        """What was not given out when the attempt ended: all, where it finished the run without a step."""
        left = self.newer()
        if self._waiting is not None and self._run.finished.exists():
            left = self._what_lasted()
        return left

    def _what_lasted(self) -> list[Step]:
        lasted, self._waiting = fold_steps(self._waiting or []).effective, None
        return self._ascending(list(lasted.values()))

    def _whole_file(self) -> Iterator[Step]:
        while steps := self._read():
            yield from steps

    def _ascending(self, steps: Sequence[Step]) -> list[Step]:
        found = []
        for step in steps:
            if step.global_step > self._last:
                found.append(step)
                self._last = step.global_step
        return found
