"""Refuse to resume if the questions, the prompt format or the weights changed, once answers are kept.

    refuse_other_asking(job, run.parts / "questions.json", Asking(task.id), "the first part was made",
has_parts)
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json, write_json
from r1hpc.train.loop.session import Job


@dataclass(frozen=True)
class Asking:
    """Ids by content of what a run asks, as far as each matters and is known."""

    task: str
    """The questions."""
    form: str | None = None
    """Prompt template, tokenizer and end tokens: tasks.tokenizer.asking_id."""
    weights: str | None = None
    """The model's weights, if a single model answers."""


def refuse_other_asking(
    job: Job, record: Path, asking: Asking, since: str, has_kept: Callable[[], bool]
) -> None:
    """Record in `record` what is asked, and refuse any change once there are answers. On every rank.

    Facts that an earlier attempt did not know are added.

    Args:
        asking: as rank 0 has it.
        since: the event from which on answers are kept, for the error.
        has_kept: True if anything is kept; called on rank 0. Until then changes are allowed.

    Raises:
        UsageError: a test file, the code of a task, the tokenizer or template, or the weights have changed.
    """
    now = {name: value for name, value in asdict(asking).items() if value is not None}
    noted = None
    if job.group.rank == 0:
        before = read_json(record) if record.exists() and has_kept() else {}
        noted = {**now, **before}
        if noted != before:
            record.parent.mkdir(mode=0o700, exist_ok=True)
            write_json(record, noted)
    now, noted = job.group.broadcast((now, noted))
    changed = [name for name in now if noted[name] != now[name]]
    if changed:
        raise UsageError(_sentence(job, changed[0], since, noted[changed[0]], now[changed[0]]))


def _sentence(job: Job, what: str, since: str, before: str, now: str) -> str:
    path = job.config.model.path
    changed, fix = {
        "task": (f"the questions have changed since {since}, from {before} to {now}", "put the file back"),
        "form": (
            f"how questions are put to {path} has changed since {since} (its tokenizer, chat template or end "
            "tokens)",
            "put the files back",
        ),
        "weights": (f"the weights in {path} have changed since {since}", "put them back"),
    }[what]
    return f"{changed}: {fix}, or begin a new run (--run-name)"
