"""Run the stages of a chain one after the other, or points of a sweep K at a time, here, without Slurm.

A stage that does not finish stops only those that need it, as Slurm's afterok does. Each stage is
`r1hpc.launch local` with its own frozen code, in a separate session. If the supervisor is killed, the stage
runs on, and the next supervisor waits for it. SIGTERM is passed on to the stage, which saves and ends, and so
the chain ends. The lock of the chain is held until then, so there is only one supervisor at a time.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from r1hpc.attempt.begin import unmet
from r1hpc.attempt.detached import start_detached
from r1hpc.attempt.state.state import read_situation
from r1hpc.base.lock import write_holder
from r1hpc.base.run_dir import RunDir
from r1hpc.submission.chain.folder import SUPERVISOR, ChainDir

_POLL_S = 0.5


class ChainSupervisor:
    """One pass over the unfinished stages."""

    def __init__(self, chain: ChainDir, runs: Sequence[RunDir], lock: int, at_most: int = 1) -> None:
        self._chain = chain
        self._runs = runs
        self._at_most = at_most
        self._stages: list[subprocess.Popen[bytes]] = []
        self._elsewhere = [run for run in runs if _is_run_by_another(run)]
        """Started by an earlier supervisor, or a person, and still running."""
        self._stopping = False
        os.set_inheritable(lock, False)  # a stage that outlives this process must not hold the chain
        write_holder(lock, SUPERVISOR)
        chain.record("supervising", pid=os.getpid(), stages=[run.run_id for run in runs])

    def supervise(self) -> int:
        """Run stage after stage; return 0 if all finish, else 1. Stages whose needs finished still run."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for run in self._runs:
            self._wait_for_room(self._at_most)
            if not (run in self._elsewhere or run.finished.exists() or self._stopping or unmet(run)):
                print(f"{self._chain.name}: {run.run_id} begins", flush=True)
                self._stages.append(start_detached(["local", str(run.path)], run, run.logs / "local.out"))
                if self._stopping:  # the signal came just before the start
                    self._pass_on()
        self._wait_for_room(1)
        left = [run.run_id for run in self._runs if not run.finished.exists()]
        said = f"ends, since {', '.join(left)} did not finish" if left else "every stage is finished"
        print(f"{self._chain.name}: {said}", flush=True)
        return 1 if left else 0

    def _wait_for_room(self, at_most: int) -> None:
        """Wait until fewer than so many stages run; once stopping, for those that were started here."""
        while True:
            self._stages = [stage for stage in self._stages if stage.poll() is None]
            if not self._stopping:
                self._elsewhere = [run for run in self._elsewhere if _is_run_by_another(run)]
            if len(self._stages) + (0 if self._stopping else len(self._elsewhere)) < at_most:
                return
            time.sleep(_POLL_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        self._pass_on()

    def _pass_on(self) -> None:
        for stage in self._stages:
            if stage.returncode is None:
                with contextlib.suppress(ProcessLookupError):  # the signal came in the midst of `poll`
                    os.killpg(stage.pid, signal.SIGTERM)


def _is_run_by_another(run: RunDir) -> bool:
    situation = read_situation(run)
    pid = situation.job.pid if situation.job is not None else None
    return situation.state.is_at_work and pid not in (None, os.getpid())
