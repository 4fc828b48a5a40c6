"""What Slurm would have taken, beside what it refused: sbatch names the mistake and no way out of it.

    raise with_choices(error)       # ... Invalid account ...\\n  your accounts: lab, guest (-A)

The words are those of slurm_errno.c, Slurm 20.11 to 24.11. Slurm is asked with a few seconds' patience; where
it does not answer, its refusal stands alone.
"""

import os
import pwd
from collections.abc import Callable

from r1hpc.slurm.client import SlurmError, call

_TIMEOUT_S = 10.0
_MOST = 12


def with_choices(error: SlurmError) -> SlurmError:
    """The refusal of sbatch, with a line of what there is to choose from where that can be asked."""
    for words, ask in _CHOICES.items():
        if words.casefold() in error.stderr.casefold():
            choices = _or_nothing(ask)
            return _said(error, f"{error}\n  {choices}") if choices else error
    return error


def is_for_good(error: SlurmError) -> bool:
    """Whether sbatch would refuse, now and later, a job that `sbatch --test-only` refused so."""
    said = error.stderr.casefold()
    return not error.unreachable and not any(words in said for words in _OF_THE_MOMENT)


def _or_nothing(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except SlurmError:
        return ""


def _said(error: SlurmError, message: str) -> SlurmError:
    return SlurmError(message, error.exit_code, error.stdout, error.stderr, error.timed_out)


def _accounts() -> str:
    return _listed("your accounts", _associations("account"), "-A ACCOUNT")


def _qos() -> str:
    names = {name for line in _associations("qos") for name in line.split(",")}
    return _listed("your QOS", names, "--qos QOS")


def _associations(column: str) -> set[str]:
    user = pwd.getpwuid(os.getuid()).pw_name
    question = ["sacctmgr", "-n", "-P", "show", "associations", f"user={user}", f"format={column}"]
    return set(call(question, _TIMEOUT_S).split())


def _partitions() -> str:
    """Names, with what one of a partition's nodes has; GPUs as Slurm writes them."""
    rows = [line.split("|") for line in call(["sinfo", "-h", "-o", "%R|%D|%c|%m|%G|%l"], _TIMEOUT_S).split()]
    shown = [
        f"{name}: {nodes} nodes of {cpus} CPUs, {memory} MB{_gpus(gres)}, up to {limit}"
        for name, nodes, cpus, memory, gres, limit in rows
    ]
    return "\n  ".join(["partitions here (-p PARTITION):", *shown[:_MOST]])


def _gpus(gres: str) -> str:
    return "" if gres == "(null)" else f", {gres}"


def _features() -> str:
    lines = call(["sinfo", "-h", "-o", "%f"], _TIMEOUT_S).split()
    names = {name for line in lines for name in line.split(",")} - {"(null)"}
    return _listed("features of the nodes here", names, "-C FEATURE")


def _listed(what: str, names: set[str], flag: str) -> str:
    if not names:
        return f"{what}: none that Slurm shows"
    shown = ", ".join(sorted(names)[:_MOST]) + (", ..." if len(names) > _MOST else "")
    return f"{what}: {shown} ({flag})"


_CHOICES: dict[str, Callable[[], str]] = {
    "invalid account": _accounts,
    "invalid qos": _qos,
    "invalid partition": _partitions,
    "node count specification invalid": _partitions,
    "more processors requested than permitted": _partitions,
    "node configuration is not available": _partitions,
    "requested time limit is invalid": _partitions,
    "invalid feature": _features,
}
_OF_THE_MOMENT = (
    "node configuration is not available",
    "partition configuration not available now",
    "requested nodes are busy",
    "required node not available",
)
"""What a test also says while nodes are down, drained or reserved: a job that is submitted waits for them."""
