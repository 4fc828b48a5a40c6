"""Train in a stage of another package: resume, save, record and stop as r1hpc's own stages do.

    def run(self, job: RankJob) -> Outcome:
        run = StageRun(job)
        run.resume(state)
        for step in run.steps(job.options.steps, state=state):
            run.log(loss=train_step(step))
        return run.outcome

`state` has save(folder) and load(folder), as client/states.py. A script has `attempt()` of run.py instead:
its process is its own, and ends where this returns.
"""

from r1hpc.attempt.workload import Outcome, RankJob
from r1hpc.client.job import Job
from r1hpc.client.run import Run


class StageRun(Run):
    """One rank's side of a run whose stage trains in the rank's own process."""

    def __init__(self, job: RankJob) -> None:
        self._watchdog = job.watchdog
        super().__init__(Job.of(job), job.requests)
        self.outcome = Outcome(False)
        """How the steps ended; complete once `steps` is."""

    def finish(self, step: int) -> None:
        super().finish(step)
        self.outcome = Outcome(True, step, self.last_saved)

    def _stop_after(self, step: int) -> None:
        self._settle()
        reason = next(filter(None, self._ranks.gather(self._requests.reason)), "")
        self.outcome = Outcome(False, step, self.last_saved, reason)

    def _tell(self, kind: str, step: int | None = None, reason: str = "") -> None:
        """Show a sign of life: here the rank itself sees how the steps end."""
        self._watchdog.beat(kind if step is None else f"{kind} after step {step}")
