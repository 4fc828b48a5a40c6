"""Explain why a run is slow, stuck or not learning, from MFU, GPU readings and step times.

    python -m r1hpc.diagnose                       # the newest attempt of the newest run
    python -m r1hpc.diagnose RUN_DIR --attempt 3
    python -m r1hpc.diagnose RUN_DIR --json

Each finding has a code, its figures and a suggestion. The batch log ends each attempt with the findings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from r1hpc.base.choose_run import add_run, choose_run
from r1hpc.base.cli import ArgumentParser, add_json, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import coloured

if TYPE_CHECKING:  # only for types: --help must be quick
    from r1hpc.telemetry.records.attempts import Attempt, History


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.diagnose", description=__doc__)
    add_run(parser)
    parser.add_argument("--attempt", type=int, metavar="K", help="default: the newest")
    parser.add_argument("--quick", action="store_true", help="read only the newest 8 MiB of the records")
    add_json(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.attempt.state.unended import corrected_history
    from r1hpc.config.stages import is_server
    from r1hpc.telemetry.diagnosis.diagnose import QUICK_BYTES, THOROUGH_BYTES, as_lines, diagnose
    from r1hpc.telemetry.diagnosis.summary import names_of

    run = choose_run(arguments.run_dir, arguments.run_root, lambda _: True)
    if is_server(names_of(run)[0]):
        raise UsageError(
            f"{run.run_id} is a server, and steps are what is judged here: what it answers is in "
            "`python -m r1hpc.status`, what it printed in `python -m r1hpc.logs`"
        )
    history = corrected_history(run)
    attempt = _choose(run, history, arguments.attempt)
    budget = QUICK_BYTES if arguments.quick else THOROUGH_BYTES
    diagnosis = diagnose(run, attempt, end=_end(run, history, attempt), max_bytes=budget)
    print_result(asdict(diagnosis), coloured("\n".join(as_lines(diagnosis))), arguments.json)
    return 0


def _choose(run: RunDir, history: History, number: int | None) -> Attempt:
    found = {attempt.attempt: attempt for attempt in history.attempts}
    if not found:
        raise UsageError(f"{run.run_id} has begun no attempt yet: there is nothing to diagnose")
    if number is None:
        return found[max(found)]
    if number not in found:
        raise UsageError(f"{run.run_id} has no attempt {number}; it has had {', '.join(map(str, found))}")
    return found[number]


def _end(run: RunDir, history: History, attempt: Attempt) -> float | None:
    """Return when the attempt ended; now if it is running; None if unknown."""
    from r1hpc.attempt.state.state import State, read_situation

    if attempt.end is not None or attempt is not history.last:
        return attempt.end
    return time.time() if read_situation(run).state is State.running else None


if __name__ == "__main__":
    run_command(main)
