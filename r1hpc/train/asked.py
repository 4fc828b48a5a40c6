"""What a run asks stays the same over its attempts: an answer that is kept must be to the same question.

refuse_other_questions(job, job.run.parts / "questions.json", task.id, since="the first part was made")
"""

from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json, write_json
from r1hpc.train.session import Job


def refuse_other_questions(job: Job, record: Path, task_id: str, since: str) -> None:
    """Note in `record` what is asked, and refuse anything else from then on. On every rank.

    Args:
        since: what was done when the note was taken, for the error.

    Raises:
        UsageError: a test file, or the code of a task, has changed.
    """
    if job.group.rank == 0 and not record.exists():
        record.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(record, {"task": task_id})
    asked = job.group.broadcast(read_json(record)["task"] if job.group.rank == 0 else None)
    if asked != task_id:
        raise UsageError(
            f"the questions have changed since {since}, from {asked} to {task_id}: put the file back, or "
            "begin a new run (--run-name)"
        )
