"""r1hpc COMMAND …: the same as python -m r1hpc.COMMAND …

r1hpc submit --nodes 4
"""

import importlib
import sys
from collections.abc import Sequence

from r1hpc.base.cli import run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.base.version import __version__

COMMANDS = {
    "submit": "start a run on Slurm or on this machine",
    "status": "state of a run and of its attempts",
    "logs": "what the ranks print",
    "cancel": "end a run",
    "estimate": "GPU-hours before they are spent",
    "budget": "what is left of the allocation, and whether it will do",
    "report": "GPU-hours: planned, used, useful, wasted",
    "doctor": "what of a cluster would cost days, before anything is spent",
    "drill": "prove that a disturbed job loses nothing",
    "settings": "every setting of a run, and where its value came from",
    "shard": "build, verify and inspect datasets",
    "monitor": "GPU readings of this node",
    "diagnose": "why it is slow, stuck or learning nothing",
    "export": "the trained model as a Hugging Face folder",
    "export-metrics": "metrics for TensorBoard, Prometheus or W&B",
    "calibrate": "what this site's own runs say of the estimates",
    "launch": "what runs inside a job; called by its script",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; the console script `r1hpc` calls this without arguments."""
    run_command(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"r1hpc {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UsageError(f"no command {printable(argv[0])!r}{nearest(argv[0], COMMANDS)}; see r1hpc --help")
    return int(importlib.import_module(f"r1hpc.{argv[0].replace('-', '_')}").main(argv[1:]))


def _help() -> str:
    lines = [f"  {name:14} {purpose}" for name, purpose in COMMANDS.items()]
    usage = "usage: r1hpc COMMAND ... (r1hpc COMMAND --help for each; r1hpc --version)"
    return "\n".join([usage, "", *lines])


if __name__ == "__main__":
    main()
