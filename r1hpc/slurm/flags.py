"""Turn sbatch's flags and SBATCH_* variables into overrides of `resources`.

Precedence, the highest first: flags, KEY=VALUE, SBATCH_* variables, the job file.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.base.cli import add_cluster, add_json, add_run_root
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.slurm import fields


@dataclass(frozen=True)
class _Flag:
    names: tuple[str, ...]
    help: str
    variable: str | None = None
    is_count: bool = False

    @property
    def option(self) -> str:
        return self.names[-1].removeprefix("--")

    @property
    def key(self) -> str:
        return self.option.replace("-", "_")


FLAGS = (
    _Flag(("-N", "--nodes"), "nodes", None, True),
    _Flag(
        ("--gpus-per-node",),
        "GPUs, and so ranks, per node, 4 or a100:4; 0: a CPU run",
        "SBATCH_GPUS_PER_NODE",
        True,
    ),
    _Flag(("--gres",), "the same as gpu:a100:4, and other resources of a node"),
    _Flag(("-c", "--cpus-per-task"), "cores per rank", None, True),
    _Flag(("-t", "--time"), "time limit, D-HH:MM:SS; default: the partition's", "SBATCH_TIMELIMIT"),
    _Flag(("-p", "--partition"), "partition", "SBATCH_PARTITION"),
    _Flag(("-A", "--account"), "account that is charged", "SBATCH_ACCOUNT"),
    _Flag(("-q", "--qos"), "quality of service", "SBATCH_QOS"),
    _Flag(("-J", "--job-name"), "name in the queue; default: the run's", "SBATCH_JOB_NAME"),
    _Flag(("-C", "--constraint"), "node features", "SBATCH_CONSTRAINT"),
    _Flag(("-w", "--nodelist"), "only these nodes"),
    _Flag(("-x", "--exclude"), "none of these nodes"),
    _Flag(("-d", "--dependency"), "start after other jobs, afterok:JOB"),
    _Flag(("--reservation",), "reservation", "SBATCH_RESERVATION"),
    _Flag(("--mem",), "memory per node, 0: all of it", "SBATCH_MEM_PER_NODE"),
    _Flag(("--comment",), "comment of the job"),
    _Flag(("--mail-type",), "when to send mail, END,FAIL"),
    _Flag(("--mail-user",), "whom to send mail to"),
)


def add_submission_flags(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add the flags of a command that submits runs, sbatch's among them; `leave_out` as for `add_flags`."""
    parser.add_argument("--executor", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, hours and Slurm's answer; write nothing"
    )
    add_run_root(parser)
    add_cluster(parser)
    parser.add_argument(
        "--over-budget", metavar="REASON", help="submit despite the budget; REASON is recorded"
    )
    add_json(parser)
    add_flags(parser, leave_out)


def submission_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of add_submission_flags's flags and of --run-name, named as in api.submit."""
    names = ("run_root", "run_name", "executor", "cluster", "over_budget", "dry_run")
    return {name: getattr(arguments, name) for name in names}


def add_flags(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add sbatch's flags to the parser, except those (by long name) without meaning for the command. --help
    leaves them out; --help-slurm prints them."""
    words = "--help with sbatch's flags, which all work here: -N, -t, -p, -A, -q, --gpus-per-node, ..."
    parser.add_argument("--help-slurm", action="help", help=words)

    def shown(text: str) -> str:
        return text if "--help-slurm" in sys.argv else argparse.SUPPRESS

    group = parser.add_argument_group("resources (sbatch's own flags)")
    parser.set_defaults(**{flag.key: None for flag in FLAGS})
    for flag in FLAGS:
        if flag.names[-1] in leave_out:
            continue
        metavar = "N" if flag.is_count else flag.option.rpartition("-")[2].upper()
        group.add_argument(*flag.names, dest=flag.key, help=shown(flag.help), metavar=metavar)
    group.add_argument("--exclusive", action="store_true", help=shown("whole nodes"))
    words = "any other sbatch option, by its long name; may be repeated"
    group.add_argument("--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help=shown(words))


def all_overrides(given: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Return all overrides, the last wins: SBATCH_* variables, KEY=VALUE, flags."""
    return [*overrides_from_environment(os.environ), *given, *overrides_from_flags(arguments)]


def overrides_from_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides for the given flags; raise UsageError for a value its field may not hold."""
    given = [(flag, getattr(arguments, flag.key)) for flag in FLAGS]
    found = [each for flag, value in given if value is not None for each in _overrides(flag, value)]
    if arguments.exclusive:
        found.append("resources.exclusive=true")
    for item in arguments.sbatch:
        key, _, value = item.partition("=")
        if key == "gres":
            found += _gres(value, "--gres")
            continue
        fields.check_extra({key: value})
        found.append(f"resources.sbatch.{key}={json.dumps(value)}")
    return found


def overrides_from_environment(environ: Mapping[str, str]) -> list[str]:
    """Return the overrides for SBATCH_* variables (sbatch(1), "INPUT ENVIRONMENT VARIABLES"); raise
    UsageError for a value its field may not hold."""
    given = [(flag, environ[flag.variable]) for flag in FLAGS if flag.variable and environ.get(flag.variable)]
    found = [override for flag, value in given for override in _overrides(flag, value, flag.variable)]
    if "SBATCH_EXCLUSIVE" in environ:
        found.append("resources.exclusive=true")
    if environ.get("SBATCH_WCKEY"):
        value = fields.check("wckey", environ["SBATCH_WCKEY"], "SBATCH_WCKEY")
        found.append(f"resources.sbatch.wckey={json.dumps(value)}")
    return found


def ignored_variables(environ: Mapping[str, str]) -> Sequence[str]:
    """Return set SBATCH_* variables without meaning here, to report rather than drop them."""
    known = {flag.variable for flag in FLAGS} | {"SBATCH_EXCLUSIVE", "SBATCH_WCKEY"}
    return sorted(name for name in environ if name.startswith("SBATCH_") and name not in known)


def _overrides(flag: _Flag, value: str, variable: str | None = None) -> list[str]:
    shown_as = variable or flag.names[-1]
    if flag.key == "gres":
        return _gres(value, shown_as)
    if flag.key == "gpus_per_node":
        return _gpus(value, shown_as)
    if not flag.is_count:
        # JSON survives YAML: a bare 12:00:00 would be read as a number to base 60.
        return [f"resources.{flag.key}={json.dumps(fields.check(flag.option, value, shown_as))}"]
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"{shown_as} {printable(value)!r} is not a whole number")
    return [f"resources.{flag.key}={value}"]


def _gpus(value: str, shown_as: str) -> list[str]:
    """Return number and type; without a type any will do, whatever the job file has."""
    count, kind = fields.read_gpus(value, shown_as)
    return [f"resources.gpus_per_node={count}", f"resources.gpu_type={json.dumps(kind)}"]


def _gres(value: str, shown_as: str) -> list[str]:
    gpus, others = fields.read_gres(value, shown_as)
    found = _gpus(gpus, "--gres") if gpus else []
    return found + ([f"resources.sbatch.gres={json.dumps(others)}"] if others else [])
