"""Run `r1hpc COMMAND …`, the same as `python -m r1hpc.COMMAND …`.

r1hpc submit --nodes 4
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import answer_tab, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.base.package import __version__

GROUPS = {
    "Run": {
        "init": "write a job file and a cluster profile from your answers",
        "submit": "start a run on Slurm or on this machine",
        "sweep": "one job with many settings, and their results compared",
        "status": "state of a run and of its attempts",
        "watch": "a run on one screen, refreshed",
        "logs": "output of the ranks",
        "samples": "what the model writes: prompts, completions, rewards",
        "cancel": "end a run",
    },
    "GPU-hours": {
        "estimate": "GPU-hours before they are spent",
        "budget": "GPU-hours left, and whether they are enough",
        "report": "GPU-hours: planned, used, useful, wasted",
        "calibrate": "compare estimates with this site's own runs",
    },
    "Check": {
        "doctor": "check a cluster before using it",
        "drill": "prove that a disturbed job loses nothing",
        "diagnose": "why a run is slow, stuck or not learning",
        "settings": "every setting of a run, and the source of its value",
        "monitor": "GPU readings of this node",
    },
    "Data and models": {
        "shard": "build, verify and inspect datasets",
        "chat": "chat with a trained model",
        "compare": "compare two models on the same questions",
        "export": "the trained model as a Hugging Face folder",
        "serve": "serve a model with OpenAI's interface, as its own job",
        "loadtest": "measure a server's throughput and latency",
    },
    "Tools": {
        "export-metrics": "metrics for TensorBoard, Prometheus or W&B",
        "completion": "TAB completion for your shell",
    },
}
COMMANDS = {name: purpose for group in GROUPS.values() for name, purpose in group.items()}
COMMANDS["launch"] = "the parts of a job; called by its script"  # no command for people: --help leaves it out
ALIASES = {
    **dict.fromkeys(("ls", "list", "ps"), ("status", "--all")),
    "stop": ("cancel", "--save-first"),
    "resume": ("submit", "--resume", "--run-name"),
    "eval": ("submit", "stage=evaluate"),
    "dashboard": ("report", "--format", "html"),
    "config": ("settings",),
    "plan": ("submit", "--dry-run"),
}
"""Words that other tools taught, and the command that does it."""
_LONGEST_LINE = 10_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; the console script `r1hpc` calls this without arguments."""
    run_command(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(argv: Sequence[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        return _answer_tab(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])])
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: r1hpc COMMAND ... (r1hpc COMMAND --help for each; r1hpc --version)")
        for heading, commands in GROUPS.items():
            lines = [f"  {name:14} {purpose}" for name, purpose in commands.items()]
            print(f"\n{heading}:", *lines, sep="\n")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"r1hpc {__version__}")
        return 0
    if argv[0] in ALIASES:
        command, *words = ALIASES[argv[0]]
        print(f"r1hpc {printable(argv[0])} is: r1hpc {' '.join((command, *words))}", file=sys.stderr)
        given = list(argv[1:])
        if words[-1:] == ["--run-name"] and given and "/" in given[0]:  # a folder, as status takes it
            folder = Path(given[0])
            given[:1] = [folder.name, "--run-root", str(folder.parent)]
        return _run(command, [*words, *given])
    if argv[0] not in COMMANDS:
        raise UsageError(
            f"no command {printable(argv[0])!r}{nearest(argv[0], (*COMMANDS, *ALIASES))}; see r1hpc --help"
        )
    return _run(argv[0], argv[1:])


def _answer_tab(line: str) -> int:
    """Complete a line of `r1hpc COMMAND ...` when TAB is pressed."""
    words = line[:_LONGEST_LINE].split()
    done = words if line[-1:].isspace() else words[:-1]
    if len(done) > 1 and done[1] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"  # argcomplete's: index of the program's word in the line
        return _run(done[1], [])
    if len(done) < 2:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("command", choices=tuple(COMMANDS))
        answer_tab(parser)
    return 0


def _run(name: str, argv: Sequence[str]) -> int:
    return int(importlib.import_module(f"r1hpc.{name.replace('-', '_')}").main(argv))


if __name__ == "__main__":
    main()
