"""What `report` says of one run: its ledger, and beside it steps, data and GPUs.

found = report_run(run, now=time.time())
found.to_json()
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.accounting.hours import fold_hours
from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import open_ledger
from r1hpc.attempt.slurm_records import ask_slurm
from r1hpc.attempt.state import all_slurm_jobs, read_situation
from r1hpc.base.rundir import RunDir
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.metrics import Audit, audit_ledger
from r1hpc.telemetry.summary import AttemptSummary, split_seconds


@dataclass(frozen=True)
class RunReport:
    """One run."""

    ledger: RunLedger
    audit: Audit
    gpus: tuple[dict[str, Any], ...]
    """telemetry.gpu_summary of each node."""

    @property
    def run(self) -> RunDir:
        return self.ledger.run

    def to_json(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "run_id": self.run.run_id,
            "run_dir": str(self.run.path),
            "stage": ledger.stage,
            "state": ledger.state,
            "gpu_hours": {**fold_hours(ledger.allocations), "source": ledger.source},
            "own_gpu_hours": fold_hours(ledger.own),
            "gap_gpu_hours": None if ledger.gap is None else vars(ledger.gap),
            "note": " ".join([ledger.note, *ledger.notes]).strip(),
            "attempts": [self._attempt(each) for each in ledger.summary.attempts],
            "steps": {
                "useful": ledger.summary.num_useful,
                "lost": ledger.summary.num_lost,
                "last": ledger.summary.last_step,
            },
            "time": split_seconds(ledger.wall()),
            "data": self.audit.to_json(),
            "gpus": list(self.gpus),
            **ledger.to_json(),
        }

    def _attempt(self, each: AttemptSummary) -> dict[str, Any]:
        return {
            **each.attempt.to_json(),
            "gpu_hours": self.ledger.split_of(each).in_hours()["allocated"] * self.ledger.gpus_of(each),
            "num_steps": each.num_steps,
            "num_lost_steps": each.num_lost,
            "time": split_seconds(self.ledger.split_of(each)),
        }


def report_run(run: RunDir, now: float, records: Sequence[JobRecord] | None = None) -> RunReport:
    """Gather it. `records` are sacct's from a file; without them sacct itself is asked, where it is there.

    Raises:
        StateError: the run folder cannot be read.
    """
    note = ""
    jobs = all_slurm_jobs(run)
    if records is None:
        found, note = ask_slurm([(run, jobs, read_situation(run).history)] if jobs else [], now, again=True)
    else:
        found = [record for record in records if record.job_id in jobs]
    if jobs and not found and not note:
        whose = "sacct" if records is None else "the file"
        note = f"{whose} has no record of job {', '.join(jobs)}"
    ledger = open_ledger(run, now, found, note)
    gpus = tuple(node.summary.result() for node in ledger.summary.gpus)
    return RunReport(ledger=ledger, audit=audit_ledger(run), gpus=gpus)
