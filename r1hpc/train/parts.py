"""Work that is cut into parts: every rank takes some, a finished part is kept, the rest is done on resume.

    done = run_parts(job, num_parts, make_part)      # make_part(n) -> lines, or None when asked to leave
    lines = read_parts(job, num_parts)

A part is one file, parts/part-<n>.jsonl, that appears whole. Which rank makes it does not enter into what it
holds, so the number of ranks may change.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.files import iter_records, write_atomic
from r1hpc.train.loop import Job, Outcome

Lines = list[dict[str, Any]]


def run_parts(job: Job, num_parts: int, make_part: Callable[[int], Lines | None]) -> Outcome:
    """Make every part that is missing; FINISHED when none is."""
    group = job.group
    if group.rank == 0:
        job.run.parts.mkdir(mode=0o700, exist_ok=True)
    missing: list[int] = group.broadcast(_missing(job, num_parts))
    if group.rank == 0:
        print(f"{num_parts - len(missing)} of {num_parts} parts are done", flush=True)
    made: list[int] = []
    for turn, number in enumerate(missing):
        if turn % group.world_size != group.rank:
            continue
        job.watchdog.beat(f"part {number}")
        lines = None if asked_to_stop(job) else make_part(number)
        if lines is None:
            break
        write_atomic(part_path(job, number), "".join(json.dumps(line) + "\n" for line in lines))
        made.append(number)
    # By word of mouth: NFS remembers for a while that a file of another node was missing.
    left = len(missing) - sum(map(len, group.gather(made)))
    reason = next(filter(None, group.gather(job.requests.reason)), "")
    return Outcome(left == 0, num_parts - left, num_parts - left or None, reason if left else "")


def read_parts(job: Job, num_parts: int) -> Iterator[dict[str, Any]]:
    """The lines of all parts, in order."""
    for number in range(num_parts):
        yield from iter_records(part_path(job, number))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines atomically; how many."""
    texts = [json.dumps(line) + "\n" for line in lines]
    write_atomic(path, "".join(texts))
    return len(texts)


def part_path(job: Job, number: int) -> Path:
    return job.run.parts / f"part-{number:06d}.jsonl"


def asked_to_stop(job: Job) -> bool:
    """This rank's own word; also a sign of life for the watchdog."""
    job.watchdog.beat("making a part")
    return job.requests.poll()[0]


def _missing(job: Job, num_parts: int) -> list[int]:
    return [number for number in range(num_parts) if not part_path(job, number).exists()]
