"""Watch a run on one screen: progress, loss or reward, GPUs, time and GPU-hours left.

    python -m r1hpc.watch                  # the newest run under the run root
    python -m r1hpc.watch RUN              # until it is over; Ctrl-C ends the watching, not the run
    python -m r1hpc.watch RUN --once       # one picture as text, for scripts and mail
    python -m r1hpc.watch CHAIN            # the active stage, then the next one

Reads the run folder, from any machine that sees it. Without a terminal it prints one picture after another.
"""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1hpc.base.choose_run import add_run, choose_run
from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import UsageError

if TYPE_CHECKING:  # --help must be quick
    from r1hpc.reporting.progress import Shown, Watched
    from r1hpc.submission.chain.folder import ChainDir

_CHAIN_EVERY_S = 10.0


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.watch", description=__doc__)
    add_run(parser, "a run or a chain: its folder or its name")
    parser.add_argument("--once", action="store_true", help="show it once")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two (2)")
    arguments = parser.parse_args(argv)
    if not 0.2 <= arguments.every <= 86400:
        raise UsageError(f"--every {arguments.every:g} is not between 0.2 and 86400 seconds")
    from r1hpc.reporting.progress import Watched
    from r1hpc.reporting.screen import follow_screen, screen_text
    from r1hpc.submission.chain.folder import choose_chain

    chain = choose_chain(arguments.run_dir, arguments.run_root)
    if chain is None:
        now = Watched(choose_run(arguments.run_dir, arguments.run_root)).now
    else:
        now = _ChainWatched(chain).now
    if arguments.once:
        print(screen_text(now()))
        return 0
    stopping = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        follow_screen(now, arguments.every, stopping)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping.is_set():
        print("no longer watching; the run is left alone", file=sys.stderr)
        return 130
    return 0


class _ChainWatched:
    """The active stage of a chain; between two stages, the earlier one."""

    def __init__(self, chain: "ChainDir") -> None:
        self._chain = chain
        self._asked_at = -_CHAIN_EVERY_S
        self._shown_run: Path | None = None
        self._watched: Watched

    def now(self) -> "Shown":
        from r1hpc.reporting.progress import Watched

        if time.monotonic() - self._asked_at >= _CHAIN_EVERY_S:
            self._look()
        if self._run.path != self._shown_run:
            self._watched, self._shown_run = Watched(self._run), self._run.path
        shown = self._watched.now()
        return replace(shown, chain=self._said, more_follows=self._is_at_work)

    def _look(self) -> None:
        """Update the stages' states, which may need a query to Slurm for each."""
        from r1hpc.submission.chain.state import read_chain_situation

        now = read_chain_situation(self._chain)
        stages = [stage for stage in now.stages if stage.situation is not None]
        if not stages:
            raise UsageError(f"no stage of {self._chain.name} was submitted yet")
        at_work = [stage for stage in stages if stage.is_at_work and not stage.unfinished_needs]
        begun = [stage for stage in stages if stage.has_begun]
        self._run = [*at_work[:1], *reversed(begun), *stages][0].run
        self._said = (
            f"{self._chain.name}: {now.state}, {now.num_finished} of {len(now.stages)} stages finished"
        )
        self._is_at_work = now.state.is_at_work
        self._asked_at = time.monotonic()


if __name__ == "__main__":
    run_command(main)
