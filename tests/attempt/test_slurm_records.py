"""What sacct says of many runs, asked in calls of many jobs."""

from pathlib import Path

import pytest

from r1hpc.attempt.state import slurm_records
from r1hpc.attempt.state.slurm_records import SlurmRecords, ask_slurm, kept_records
from r1hpc.base.files import write_json
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import JobRecord, to_record
from r1hpc.telemetry.records.attempts import read_history
from tests.recorded import EPOCH, RecordedRun


def test_a_later_call_that_fails_does_not_lose_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for number in (1, 2):
        made = RecordedRun(tmp_path / f"run-{number}", gpus=4)
        made.submit(str(number), "slurm")
        made.attempt(1, 5, "finished", committed=5, save_every=5)
        runs.append((made.run, [str(number)], read_history(made.run)))

    def answer(job_id: str, since: float | None = None, timeout_s: float = 30.0) -> list[JobRecord]:
        if job_id != "1":
            raise SlurmError("sacct failed", 1, stderr="sacct: error: slurmdbd is away")
        row = {"jobid": "1", "state": "COMPLETED", "alloctres": "gres/gpu=4", "elapsedraw": "60"}
        return [to_record({**row, "start": str(int(EPOCH)), "end": str(int(EPOCH) + 60)})]

    monkeypatch.setattr(slurm_records, "_JOBS_PER_CALL", 1)
    monkeypatch.setattr(slurm_records, "sacct_records", answer)
    found, why = ask_slurm(runs, EPOCH + 1e4)
    assert [record.job_id for record in found] == ["1"]
    assert "slurmdbd is away" in why
    assert [bool(kept_records(run).records) for run, _, _ in runs] == [True, False]


@pytest.mark.parametrize("missing", ["records", "seen", "asked"])
def test_of_a_file_that_lacks_something_nothing_counts(tmp_path: Path, missing: str) -> None:
    made = RecordedRun(tmp_path / "run")
    value = {"version": 1, "records": [], "seen": EPOCH, "asked": EPOCH}
    write_json(made.run.allocations, value)
    assert kept_records(made.run).seen == EPOCH
    write_json(made.run.allocations, {key: each for key, each in value.items() if key != missing})
    assert kept_records(made.run) == SlurmRecords()
