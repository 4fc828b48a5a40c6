"""A submission whose answer was lost, with an sbatch and a squeue that answer as a test wants it.

The same by a slurmctld that is frozen: tests/test_life_slurm.py.
"""

from pathlib import Path

import pytest

from r1hpc.base.errors import StateError
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sbatch import PATIENCE_S, LostSubmissionError, read_job_id, sbatch

_LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


class _Slurm:
    """sbatch says what it is told to; squeue lists job 7 of the run, and job 8 from its `nth` call on."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.run = folder / "run"
        self.bin.mkdir()
        self.waited = 0.0

    def sbatch(self, body: str) -> None:
        self._script("sbatch", body)

    def squeue(self, nth: int, before: str = "exit 0") -> None:
        count = f"$(grep -c ^squeue {self.bin}/calls)"
        shown = f"echo 7 {self.run}; echo 9 /elsewhere"
        self._script("squeue", f"{shown}\n[ {count} -ge {nth} ] || {{ {before}; }}\necho 8 {self.run}")

    def _script(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\necho {name} $* >> {self.bin}/calls\n{body}\n")
        (self.bin / name).chmod(0o700)

    def submit(self, known: list[str] | None = None) -> str:
        return sbatch(self.run / "job.sh", self.run, known=known)

    def sleep(self, seconds: float) -> None:
        self.waited += seconds

    def monotonic(self) -> float:
        return self.waited

    @property
    def submissions(self) -> int:
        return (self.bin / "calls").read_text().count("sbatch ")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    made = _Slurm(tmp_path)
    for module in ("client", "sbatch"):
        monkeypatch.setattr(f"r1hpc.slurm.{module}.time", made)
    return made


@pytest.mark.parametrize("answer", [f"echo '{_LOST}' >&2; exit 1", "echo queued, probably"])
@pytest.mark.parametrize("nth", [2, 4])
def test_a_job_whose_answer_was_lost_is_found(slurm: _Slurm, answer: str, nth: int) -> None:
    slurm.sbatch(answer)
    slurm.squeue(nth)
    assert slurm.submit() == "8"
    assert slurm.submissions == 1


def test_a_submission_that_did_not_arrive_is_an_error(slurm: _Slurm) -> None:
    slurm.sbatch(f"echo '{_LOST}' >&2; exit 1")
    slurm.squeue(99)
    with pytest.raises(SlurmError, match="Socket timed out") as raised:
        slurm.submit()
    assert not isinstance(raised.value, LostSubmissionError)
    assert slurm.submissions == 1


def test_where_slurm_stays_silent_nobody_knows(slurm: _Slurm) -> None:
    slurm.sbatch(f"echo '{_LOST}' >&2; exit 1")
    slurm.squeue(2)
    assert slurm.submit() == "8"
    slurm.waited = 0.0
    slurm._script("squeue", f"[ $(grep -c ^sbatch {slurm.bin}/calls) = 1 ] || exit 1")
    with pytest.raises(LostSubmissionError, match="there may be a job of it"):
        slurm.submit()
    assert slurm.waited >= PATIENCE_S


def test_a_refusal_is_no_lost_answer(slurm: _Slurm) -> None:
    slurm.sbatch("echo 'sbatch: error: invalid partition specified: no' >&2; exit 1")
    slurm.squeue(2)
    with pytest.raises(SlurmError, match="invalid partition"):
        slurm.submit()
    assert slurm.waited == 0


def test_a_job_that_nobody_wrote_down_is_refused(slurm: _Slurm) -> None:
    slurm.sbatch("echo 8")
    slurm.squeue(99)
    assert slurm.submit(known=["7"]) == "8"
    with pytest.raises(StateError, match=r"job 7 of run is in the queue.*scancel 7"):
        slurm.submit(known=["6"])


def test_job_ids() -> None:
    assert read_job_id("Your group has 40 % of its hours left\n123;alpha\n") == "123"
    with pytest.raises(StateError, match="squeue"):
        read_job_id("queued, probably")


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_the_job_of_an_sbatch_that_was_killed_is_found(slurm: _Slurm, signal: str) -> None:
    """Killed after its request was served, for memory or by the login node's limits."""
    slurm.squeue(nth=2)
    slurm.sbatch(f"kill -{signal} $$; sleep 9")
    assert slurm.submit() == "8"
    assert slurm.submissions == 1


def test_an_sbatch_that_was_killed_before_its_request_has_made_no_job(slurm: _Slurm) -> None:
    slurm.squeue(nth=99)
    slurm.sbatch("kill -KILL $$; sleep 9")
    with pytest.raises(SlurmError, match="exit status -9"):
        slurm.submit()
