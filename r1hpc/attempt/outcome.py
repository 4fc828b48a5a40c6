"""What each rank leaves behind about its end, in attempts/<k>/rank_<n>.json, for `end` to read."""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields

from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, read_object, write_json
from r1hpc.base.names import printable
from r1hpc.base.rundir import RunDir

FINISHED = "finished"
STOPPED = "stopped"
FAILED = "failed"
HANG = "hang"
LEFT_ALONE = "left alone"
"""It left because another rank failed."""
_ERROR = re.compile(
    r"No space left on device|Disk quota exceeded|^error: |^(\w+\.)*\w*(Error|Exception)(:|$)"
)
_MOST_LOGS, _LOG_BYTES, _LOG_LINES = 64, 8192, 20


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended. `cause` is set where the rank itself knows it (oom, crash, refused)."""

    rank: int
    kind: str
    node: str
    global_step: int | None = None
    reason: str = ""
    cause: str | None = None
    detail: str = ""
    kept: int = 0
    """Finished pieces of work beyond the last committed step that the next attempt will find."""


def write_outcome(run: RunDir, attempt: int, outcome: RankOutcome) -> None:
    """Durable before the rank exits."""
    write_json(run.rank_outcome(attempt, outcome.rank), asdict(outcome))


def read_outcomes(run: RunDir, attempt: int) -> list[RankOutcome]:
    """Those ranks that could still write, in rank order; a file that is damaged is one that is not there."""
    found = []
    for path in run.attempt_dir(attempt).glob("rank_*.json"):
        value = read_object(path, RankOutcome)
        if value:
            known = {each.name for each in fields(RankOutcome)} & value.keys()
            found.append(RankOutcome(**{name: value[name] for name in known}))
    return sorted(found, key=lambda outcome: outcome.rank)


def failures_in_logs(
    run: RunDir, attempt: int, ranks: int, nodes: Sequence[str], known: Collection[int]
) -> list[RankOutcome]:
    """Return a failure for each rank without an outcome (`known` have one) whose log ends with an error.

    A full disk takes no outcome, but the log may still say so.
    """
    found = []
    for rank in [rank for rank in range(ranks) if rank not in known][:_MOST_LOGS]:
        try:
            with open_plain(run.rank_log(attempt, rank)) as file:
                file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
                lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
        except (OSError, StateError):
            continue
        error = next((line for line in reversed(lines) if _ERROR.search(line)), None)
        if error is not None:
            node = nodes[rank * len(nodes) // ranks] if nodes else "?"
            cause = "oom" if re.match(r"[\w.]*(OutOfMemory|Memory)Error", error) else None
            detail = printable(error.removeprefix("error: "))[:500]
            found.append(RankOutcome(rank, FAILED, node, cause=cause, detail=detail))
    return found
