"""A run in its first attempt, with a scontrol that answers as a test wants it."""

import time
from pathlib import Path

from r1hpc.submission.chain.next_job import end_and_go_on
from tests.recorded import RecordedRun

SHOWN = (
    "JobId=7 JobName=demo UserId=me(1) JobState={state} Reason=None Requeue=1 Restarts=0 TimeLimit=UNLIMITED "
    "StartTime=100 EndTime={end} PreemptTime={preempted}\n"
)
RUNNING = SHOWN.format(state="RUNNING", end=900, preempted="None")
# As Slurm 24.11 shows a job whose batch script lives on: after scancel, also in the grace time of a
# preemption, and at the end of that time where PreemptMode is CANCEL.
CANCELLED = SHOWN.format(state="COMPLETING", end=500, preempted="None")
CANCELLED_IN_GRACE = SHOWN.format(state="COMPLETING", end=500, preempted="490")
END_OF_GRACE = SHOWN.format(state="COMPLETING", end=500, preempted="500")


class EndingJob:
    """A run in its first attempt, in job 7; `bin/scontrol` answers from files."""

    def __init__(self, folder: Path) -> None:
        self.recorded = RecordedRun(folder / "demo")
        self.recorded.clock = time.time() - 60
        self.recorded.submit("7", "slurm")
        self.recorded.begin(host="n1")
        self.run = self.recorded.run
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "scontrol").write_text(
            f"#!/bin/bash\ncd {self.bin}\necho $* >> calls\n"
            "[ $1 = show ] && { cat show$(grep -c show calls); exit 0; }\n"
            "[ -s requeue ] || exit 0\ncat requeue >&2; exit 1\n"
        )
        (self.bin / "scontrol").chmod(0o700)
        self.slurm_says(RUNNING, RUNNING)
        (self.bin / "requeue").write_text("Job is pending execution for job 7")

    def slurm_says(self, *shown: str) -> None:
        """At the verdict, ahead of the requeue, after it."""
        for count, text in enumerate(shown, start=1):
            (self.bin / f"show{count}").write_text(text)

    @property
    def asked_for(self) -> list[str]:
        """The requeues."""
        return [call for call in (self.bin / "calls").read_text().splitlines() if call.startswith("requeue")]

    def end(self) -> int:
        """As the job script does after ranks that SIGTERM ended before they could listen."""
        return end_and_go_on(self.run, 1, 143)
