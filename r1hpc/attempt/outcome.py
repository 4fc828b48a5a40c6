"""What each rank leaves behind about its end, in attempts/<k>/rank_<n>.json, for `end` to read."""

from dataclasses import asdict, dataclass, fields

from r1hpc.base.files import read_object, write_json
from r1hpc.base.rundir import RunDir

FINISHED = "finished"
STOPPED = "stopped"
FAILED = "failed"
HANG = "hang"
LEFT_ALONE = "left alone"
"""It left because another rank failed."""


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
