"""Decide from Slurm's own words why it ended a job: the one table of (JobState, Reason, sacct's State) → end.

job.bash holds the same rows as a `case`, docs/preemption.md as a table. After a change write both again:
    python -m r1hpc.slurm.shell.endings r1hpc/slurm/job.bash docs/preemption.md
"""

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

LOST = "CANCELLED by nobody"
"""State of a job that slurmctld forgot in a start without its saved state: sacct names no user."""
_GRACE = "grace"
_MARKED = re.compile(r"(-- endings, from[^\n]*\n)(?:[^\n]*\n)*?([^\n]*-- end of endings)")


@dataclass(frozen=True)
class Ending:
    """One row. A job's row is the first that fits."""

    job_states: tuple[str, ...]
    """`scontrol show job`: COMPLETING hides what made the job complete."""
    reason: str
    """Slurm's Reason, as a pattern."""
    sacct: tuple[str, ...]
    """The states that accounting may show; the first stands for the row."""
    cause: str
    """telemetry.records.attempts.Cause; empty: the job ended by itself."""
    detail: str
    word: str
    """Its word in the job script; `over`: Slurm takes the job for ended. Empty: it never sees this."""
    at_grace_end: bool = False
    """Only if PreemptTime equals EndTime, as at the end of a grace time (seen with Slurm 24.11)."""


_NODE_DOWN = "a node of the job went down"
_NO_TIME = "its time limit, its reservation or the hours of its account or QOS ended"
_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD")
TABLE = (
    Ending(("NODE_FAIL", "BOOT_FAIL"), "*", ("NODE_FAIL", "BOOT_FAIL"), "node_fail", _NODE_DOWN, "over"),
    Ending(("OUT_OF_MEMORY",), "*", ("OUT_OF_MEMORY",), "oom", "Slurm killed it for memory", "over"),
    Ending(("TIMEOUT",), "*", ("TIMEOUT",), "timeout", _NO_TIME, "over"),
    Ending(("DEADLINE",), "*", ("DEADLINE",), "timeout", "the job's --deadline passed", "over"),
    Ending(("FAILED",), "*", ("FAILED",), "", "it ended by itself", "over"),
    Ending(("COMPLETED",), "*", ("COMPLETED",), "", "it ended by itself", ""),
    Ending(("COMPLETING",), "NodeDown", ("NODE_FAIL",), "node_fail", _NODE_DOWN, "over"),
    Ending(("PREEMPTED",), "*", ("PREEMPTED",), "preempted", "preempted by Slurm", _GRACE),
    Ending(("COMPLETING",), "*", ("PREEMPTED",), "preempted", "preempted by Slurm", _GRACE, True),
    # Also at the end of a reservation, and of the minutes of an account or QOS, which may add a sentence.
    Ending(("COMPLETING",), "TimeLimit", ("TIMEOUT",), "timeout", _NO_TIME, "limit"),
    Ending(("COMPLETING",), "*exceeds*", ("TIMEOUT",), "timeout", _NO_TIME, "limit"),
    Ending(_WAITS, "*", ("REQUEUED",), "preempted", "requeued by scontrol", "requeue"),
    Ending(("COMPLETING", "CANCELLED"), "*", ("CANCELLED",), "cancelled", "cancelled by a user", "cancel"),
    Ending((), "*", (LOST,), "cluster", "slurmctld lost the job when it started without its state", ""),
)
BY_SACCT = {state: row for row in reversed(TABLE) for state in row.sacct}
"""The first row of each State."""


def of_states(states: Collection[str]) -> Ending | None:
    """Return the first row of these states of accounting that has a cause; None if there is none."""
    rows = [BY_SACCT[state] for state in states if state in BY_SACCT and BY_SACCT[state].cause]
    return min(rows, key=TABLE.index, default=None)


def as_shell() -> str:
    """Return the arms of the job script's `case "JobState/Reason/grace"`."""
    lines = []
    for row in filter(lambda row: row.word, TABLE):
        end = _GRACE if row.at_grace_end else "*"
        patterns = " | ".join(f"{state}/{row.reason}/{end}" for state in row.job_states)
        lines.append(f"        {patterns}) echo {row.word} ;;")
    return "\n".join(lines)


def as_markdown() -> str:
    """Return the table of the documentation."""
    lines = ["", "| JobState | Reason | sacct's State | cause | in the record |", "|---|---|---|---|---|"]
    for row in TABLE:
        reason = "PreemptTime is EndTime" if row.at_grace_end else row.reason.replace("*", "…")
        states = ", ".join(row.job_states) or "unknown to slurmctld"
        cells = states, reason, ", ".join(row.sacct), row.cause or "by srun and ranks", row.detail
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def with_table(text: str) -> str:
    """Return a file's text with the rows of today between its marks."""
    rows = as_markdown() if "<!-- -- endings" in text else as_shell()
    return _MARKED.sub(lambda found: f"{found[1]}{rows}\n{found[2]}", text)


if __name__ == "__main__":
    for _path in map(Path, sys.argv[1:]):
        _path.write_text(with_table(_path.read_text()))
