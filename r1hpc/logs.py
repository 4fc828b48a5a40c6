"""Print the output of a run's ranks.

    python -m r1hpc.logs                # newest run, last attempt, rank 0, last 50 lines
    python -m r1hpc.logs RUN_DIR -f     # and new lines, over all attempts, until the run is over
    python -m r1hpc.logs RUN_DIR --rank 3 --attempt 1 -n 200
    python -m r1hpc.logs CHAIN -f       # the active stage and those after it; CHAIN/STAGE is a run

Control characters are removed: a log can contain anything a model or a library printed.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from r1hpc.base.choose_run import add_run
from r1hpc.base.cli import ArgumentParser, add_json, print_json, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import fit

if TYPE_CHECKING:
    from r1hpc.api import Chain


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.logs", description=__doc__)
    add_run(parser, "a run or a chain: its folder or its name")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="global rank (0)")
    parser.add_argument("--attempt", type=int, metavar="K", help="default: the last one")
    parser.add_argument("-n", "--lines", type=int, default=50, metavar="LINES", help="how many (50)")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.lines < 0:
        raise UsageError(f"-n {arguments.lines}: give a number of lines, 0 or more")
    if arguments.json and arguments.follow:
        raise UsageError("--json prints one object and ends: leave -f out")
    if arguments.attempt is not None and arguments.attempt < 1:
        raise UsageError(f"--attempt {arguments.attempt}: attempts are numbered from 1")
    from r1hpc.api import Chain, open_run_or_chain

    chosen = open_run_or_chain(arguments.run_dir, arguments.run_root)
    if isinstance(chosen, Chain):
        if arguments.follow and arguments.attempt is None:
            return _follow_chain(chosen, arguments.rank, arguments.lines)
        run = chosen.situation().current.run
    else:
        run = chosen.folder
    if arguments.follow:
        return _follow(run, arguments.rank, arguments.attempt, arguments.lines)
    from r1hpc.attempt.state.logs import clean, find_log, last_attempt, tail

    attempt = arguments.attempt or last_attempt(run)
    path = find_log(run, attempt, arguments.rank)
    lines = [clean(line) for line in tail(path, arguments.lines)]
    if arguments.json:
        about = {"run_id": run.run_id, "attempt": attempt, "rank": arguments.rank, "path": str(path)}
        print_json({**about, "lines": lines})
    else:
        print(fit("\n".join(lines), sys.stdout), end="\n" if lines else "")
    return 0


def _follow_chain(chain: "Chain", rank: int, lines: int) -> int:
    """Follow the active stage until it is over, then the next, as long as each finishes."""
    from r1hpc.attempt.state.logs import wait_until_it_begins

    while True:
        stage = chain.situation().current
        print(f"==> stage {stage.name} <==", flush=True)
        status = _follow(stage.run, rank, None, lines)
        if status or not stage.run.finished.exists():
            return status
        open_stages = [s for s in chain.situation().stages if not s.run.finished.exists()]
        if not open_stages or not open_stages[0].is_at_work:
            return 0
        wait_until_it_begins(open_stages[0].run)


def _follow(run: RunDir, rank: int, attempt: int | None, lines: int) -> int:
    from r1hpc.attempt.state.logs import follow

    try:
        for line in follow(run, rank, attempt, lines):
            print(fit(line, sys.stdout), flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    run_command(main)
