"""Check which characters each field of a job may hold, before anything is written or run.

A job script is shell, and sbatch reads its first lines as options; so allow-lists per field refuse a value
that could end a line, open a quote, start an option or be expanded. `cluster.setup` is the exception: it is
shell on purpose, and comes only from a profile file (see `refuse_shell_overrides`).

It also reads `--gres` and counts of GPUs, and refuses a run folder that other users could replace.
"""

import grp
import os
import pwd
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.base.units import parse_time

if TYPE_CHECKING:  # only for types: the flags of `submit --help` need no schema
    from r1hpc.config.schema.cluster import ClusterConfig, ContainerConfig, ResourcesConfig

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_WORDS = rf"{_WORD}(,{_WORD})*"
_JOB = r"\d+(_(\d+|\*))?(\+\d+)?"
_AFTER = rf"(after|afterany|afternotok|afterok|aftercorr|afterburstbuffer)(:{_JOB})+"

# option -> (pattern, description)
RULES: dict[str, tuple[str, str]] = {
    "job-name": (r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", "at most 64 letters, digits and . _ + -"),
    "partition": (_WORDS, "names of letters, digits and . _ + -, separated by commas"),
    "account": (r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*", "letters, digits and . _ @ + -"),
    "qos": (r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*", "letters, digits and . _ @ + -"),
    "constraint": (r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:=&|*()\[\]+-]*", "feature names joined by & | , * ( ) [ ]"),
    "nodelist": (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "node names such as n1,gpu[01-08]"),
    "exclude": (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "node names such as n1,gpu[01-08]"),
    "reservation": (_WORDS, "names of letters, digits and . _ + -"),
    "dependency": (
        rf"singleton|{_AFTER}([,?]({_AFTER}|singleton))*",
        "afterok:JOB[:JOB…], afterany:…, singleton, joined by commas",
    ),
    "comment": (
        r"[A-Za-z0-9_][A-Za-z0-9_ .,:=+/@%-]{0,255}",
        "at most 256 letters, digits, spaces and . , : = + / @ % _ -",
    ),
    "mail-type": (r"[A-Za-z][A-Za-z0-9_]*(,[A-Za-z][A-Za-z0-9_]*)*", "words such as END,FAIL"),
    "mail-user": (r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*", "a user name or a mail address"),
    "mem": (r"\d+[KMGTkmgt]?[Bb]?", "a number with K, M, G or T; 0 is all of a node"),
    "time": (r"[0-9:-]+", "M, M:S, H:M:S, D-H, D-H:M or D-H:M:S"),
}
_OTHER_VALUE = (
    r"[A-Za-z0-9_\[][A-Za-z0-9_ .,:=+/@%*\[\]-]*",
    "letters, digits, spaces and . , : = + / @ % * [ ] _ -",
)
_INTERPRETER = (
    r"[A-Za-z0-9_./][A-Za-z0-9_./+@-]*( [A-Za-z0-9_./+@=:,-]+)*",
    "the path of a python, or a command that starts one such as `uv run python`",
)
_CONTAINER_WORD = (r"[A-Za-z0-9_./:#@+=,~-]+", "letters, digits and . / : # @ + = , ~ _ -")
_NO_ENVIRONMENT = {"-e", "--cleanenv", "-c", "--contain", "-C", "--containall", "--no-env"}
_VARIABLE_NAME = (r"[A-Za-z_][A-Za-z0-9_]*", "letters, digits and _")
_VARIABLE_VALUE = (
    r"[A-Za-z0-9_ ./,:=+@%^~*\[\]-]*",
    "letters, digits, spaces and . , / : = + @ % ^ ~ * [ ] _ -",
)
_PATH = r"/[\w ./+@=,-]*"

_HAVE_A_FLAG = frozenset(RULES) | {"nodes", "gpus-per-node", "cpus-per-task", "exclusive"}
# Options r1hpc sets itself, and those that would take the ranks, the log or the code from it.
_OWNED: dict[str, str] = {
    "output": "logs are in the run folder",
    "error": "logs are in the run folder",
    "open-mode": "a requeued job must append to its log",
    "signal": "use resources.signal_lead_s=SECONDS",
    "requeue": "a preempted run must be able to come back",
    "no-requeue": "a preempted run must be able to come back",
    "chdir": "a job starts in its run folder",
    "export": "the job's environment is an allow-list: add to cluster.environment",
    "export-file": "the job's environment is an allow-list: add to cluster.environment",
    "get-user-env": "the job's environment is an allow-list: add to cluster.environment",
    "wrap": "the job's command is r1hpc's",
    "ntasks": "there is one task per GPU",
    "ntasks-per-node": "there is one task per GPU",
    "ntasks-per-gpu": "there is one task per GPU",
    "gres": "use the flag --gres, or resources.gpus_per_node and resources.gpu_type",
    "gpus": "use --gpus-per-node; Slurm refuses two forms of it",
    "gpus-per-task": "use --gpus-per-node; ranks of a node must see each other's GPUs",
    "array": "a run is one job",
    "parsable": "r1hpc reads sbatch's answer",
    "test-only": "use --dry-run",
    "wait": "use --follow",
    "hold": "submit when it may start",
    "clusters": "submit on the cluster itself",
    "uid": "jobs are submitted as yourself",
    "gid": "jobs are submitted as yourself",
}
# The long options of sbatch(1) of Slurm 24.11 that are neither a flag here nor owned. sbatch also takes
# their beginnings (`signa`), which would get past _OWNED.
_OPTIONS = frozenset(
    """
    acctg-freq batch bb bbf begin cluster-constraint container container-id contiguous core-spec
    cores-per-socket cpu-freq cpus-per-gpu deadline delay-boot distribution extra extra-node-info
    gpu-bind gpu-freq gpus-per-socket gres-flags hint ignore-pbs input kill-on-invalid-dep licenses
    mcs-label mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile ntasks-per-core
    ntasks-per-socket oom-kill-step overcommit oversubscribe prefer priority profile propagate quiet
    reboot resv-ports segment sockets-per-node spread-job stepmgr switches thread-spec threads-per-core
    time-min tmp tres-bind tres-per-task use-min-nodes verbose wait-all-nodes wckey
    """.split()  # noqa: SIM905  # a list of 60 quoted words hides them
)


def check(option: str, value: str, shown_as: str | None = None) -> str:
    """Return `value` if the sbatch option may hold it, else raise UsageError with the field, the first wrong
    character, and the allowed ones."""
    pattern, words = RULES.get(option, _OTHER_VALUE)
    _match(pattern, words, value, shown_as or f"--{option}")
    if option == "time" and parse_time(value) == 0:
        raise UsageError("--time is 0: give a limit such as 12:00:00")
    return value


def check_extra(options: Mapping[str, str]) -> None:
    """Raise UsageError for `--sbatch KEY=VALUE` options with a key that is no sbatch long option, one that
    r1hpc sets itself, or a bad value."""
    for key, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise UsageError(
                f"--sbatch {printable(key)!r}: the key must be a long option of sbatch without its dashes, "
                "such as wckey"
            )
        if key in _OWNED:
            raise UsageError(f"--sbatch {key}: not possible, {_OWNED[key]}")
        if key in _HAVE_A_FLAG:
            raise UsageError(f"--sbatch {key}: use the flag --{key} itself")
        if key not in _OPTIONS:
            raise UsageError(f"--sbatch {key}: sbatch has no such option{nearest(key, _OPTIONS)}")
        if value:
            check(key, value, f"--sbatch {key}")


def check_path(path: Path, what: str) -> None:
    """Raise UsageError for a path that a job script, Slurm's file patterns or PYTHONPATH cannot hold: with a
    quote, a percent sign, a colon, a control character or the like."""
    _match(_PATH, "letters, digits, spaces and . _ / + @ = , -", str(path), what)


def check_parents(path: Path, trust_shared: bool = False) -> None:
    """Raise StateError for a run folder that another user could replace, since its code runs as you.

    Checks each folder above the path, and above the target of each symbolic link on the way. `trust_shared`
    accepts folders that other users own or a group may write.
    """
    trust = "set cluster.trust_shared_run_root=true if you trust"
    for entry in sorted(_way_to(path)):
        if not os.path.lexists(entry):
            continue
        status, is_link = entry.lstat(), entry.is_symlink()
        is_open = not is_link and not status.st_mode & stat.S_ISVTX
        if is_open and status.st_mode & 0o002:
            raise StateError(
                f"every user may replace files in {entry}: choose another --run-root, "
                f"or run: chmod +t {entry}"
            )
        if trust_shared:
            continue
        if status.st_uid not in (os.getuid(), 0):
            owner = _name(pwd.getpwuid, status.st_uid)
            raise StateError(
                f"{entry} belongs to {owner}, who could replace your runs and so run code as you: "
                f"choose another --run-root, or {trust} {owner}"
            )
        if is_open and status.st_mode & 0o020 and not _is_private_group(status.st_gid):
            group = _name(grp.getgrgid, status.st_gid)
            raise StateError(
                f"group {group} may write {entry}, so its members could replace your runs and run code as "
                f"you: choose another --run-root, run: chmod g-w {entry}, or {trust} the group"
            )


def _way_to(path: Path, seen: frozenset[Path] = frozenset()) -> set[Path]:
    """Return every folder and link that the kernel looks at to find `path`."""
    found = set(path.absolute().parents)
    for link in filter(Path.is_symlink, (path.absolute(), *path.absolute().parents)):
        if link in seen:
            raise StateError(f"{link} is a link that leads back to itself: choose another --run-root")
        target = link.parent / link.readlink()
        found |= {link, target, *_way_to(target, seen | {link})}
    return found


def _name(lookup: Callable[[int], Sequence[Any]], number: int) -> str:
    try:
        return str(lookup(number)[0])
    except KeyError:
        return str(number)


def _is_private_group(gid: int) -> bool:
    """True for the group that many systems make for each user, in which nobody else is."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}


def check_resources(resources: "ResourcesConfig") -> None:
    """Check every text field a user can set for Slurm; raise UsageError for the first wrong one."""
    for option in RULES:
        value = getattr(resources, option.replace("-", "_"))
        if value is not None:
            check(option, value)
    check_extra({key: value for key, value in resources.sbatch.items() if key != "gres"})
    if "gres" in resources.sbatch and read_gres(resources.sbatch["gres"], "resources.sbatch.gres")[0]:
        raise UsageError("resources.sbatch.gres names GPUs: write resources.gpus_per_node and .gpu_type")
    _match(_WORD, "a type such as a100, as sinfo -o %G shows it", resources.gpu_type, "resources.gpu_type")


def read_gres(text: str, shown_as: str) -> tuple[str, str]:
    """Return the GPUs of a sbatch --gres as `[TYPE:]N`, and its other resources; either may be empty. Raise
    UsageError if it is not a gres, or has two kinds of GPU."""
    check("gres", text, shown_as)
    parts = text.split(",")
    gpus = [part for part in parts if part.partition(":")[0] == "gpu"]
    if len(gpus) > 1:
        raise UsageError(f"{shown_as} {printable(text)!r} names two kinds of GPU: a run has one")
    others = ",".join(part for part in parts if part not in gpus)
    return (gpus[0].partition(":")[2] or "1" if gpus else ""), others


def read_gpus(text: str, shown_as: str) -> tuple[int, str | None]:
    """Return the number and type of `4` or `a100:4`; raise UsageError if it is neither."""
    kind, colon, count = text.rpartition(":")
    if not (count.isascii() and count.isdigit()):
        count, kind = ("1", text) if shown_as == "--gres" and re.fullmatch(_WORD, text) else ("", kind)
    if not count or (colon and not re.fullmatch(_WORD, kind)):
        raise UsageError(
            f"{shown_as} {printable(text)!r} is not a whole number, nor TYPE:NUMBER such as a100:4"
        )
    return int(count), kind or None


def check_cluster(cluster: "ClusterConfig") -> None:
    """Check the fields of a profile, except `setup`, which is shell on purpose."""
    for option in ("partition", "account", "qos", "mem"):
        value = getattr(cluster, option)
        if value is not None:
            check(option, value, f"cluster.{option}")
    if cluster.python is not None:
        _match(*_INTERPRETER, cluster.python, "cluster.python")
        if Path(cluster.python.split()[0]).name in ("apptainer", "singularity", "docker", "podman", "enroot"):
            raise UsageError(
                "cluster.python starts a container, which has no scontrol to requeue a job: name the image "
                "as cluster.container.image, in which the ranks run"
            )
    _match(r"[a-z_]+(:[A-Za-z0-9_,*]+)?", "a word such as cores", cluster.cpu_bind, "cluster.cpu_bind")
    if cluster.container.image is not None:
        _check_container(cluster.container)
    _match(_WORD, "an interface name such as ib0", cluster.network_interface, "cluster.network_interface")
    for name, value in cluster.environment.items():
        _match(*_VARIABLE_NAME, name, "a name in cluster.environment")
        _match(*_VARIABLE_VALUE, value, f"cluster.environment.{name}")
    for line in cluster.setup:
        if "\0" in line:
            raise UsageError("a line of cluster.setup holds a NUL character")


def _check_container(container: "ContainerConfig") -> None:
    words = [("image", container.image), ("python", container.python)]
    words += [("binds", word) for word in container.binds] + [("options", word) for word in container.options]
    for name, word in words:
        _match(*_CONTAINER_WORD, word, f"cluster.container.{name}")
        if word in _NO_ENVIRONMENT:
            raise UsageError(f"cluster.container.options {word}: ranks need the variables that Slurm sets")
    image = Path(container.image or "/")
    is_file = container.runtime != "pyxis" and "://" not in str(container.image)
    if is_file and not (image.is_absolute() and image.exists()):
        raise UsageError(f"cluster.container.image {image} is not the absolute path of an image that exists")


def refuse_shell_overrides(overrides: Sequence[str]) -> None:
    """Refuse `cluster.setup=…`, or a full `cluster={…}`, on a command line: shell comes from files only."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key == "cluster" or re.match(r"cluster\.setup($|[.\[])", key):
            raise UsageError(
                f"{printable(key)} cannot be set on the command line, since its lines are run by a shell: "
                "write them into configs/cluster/NAME.yaml and pass --cluster NAME"
            )


def _match(pattern: str, words: str, value: str | None, what: str) -> None:
    """Raise UsageError unless the value is None or fits."""
    if value is None or re.fullmatch(pattern, value):
        return
    why = ""
    if not value:
        why = " because it is empty"
    elif value.startswith("-"):
        why = " because it begins with '-'"
    elif bad := re.search(r"[^\w ./+@=,:%*()\[\]&|^~-]", value):
        why = f" because of {bad[0]!a}"
    raise UsageError(f"{what} {printable(value)!r} is refused{why}: it may hold {words}")
