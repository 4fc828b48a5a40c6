"""Freeze a run's configuration, code and environment into its folder before submission.

Every attempt runs `code/`, never the working tree, which may have changed. No probable secret is written: it
is redacted if only displayed, and refused if the run would have to use it.
"""

import datetime
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import read_object, write_atomic, write_json
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load, plugins
from r1hpc.config.paths import files_in, names_in
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.secrets import find_secret, find_written_out, is_secret_name, redact, secret_values

_ASSETS = ("jobs", "configs", "shards", "sbatch")
_GIT_TIMEOUT_S = 20.0
_MAX_DIFF_BYTES = 4 << 20
_RECORDED = (
    ("HOME", "PATH", "USER", "LANG", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "PYTHONPATH"),
    ("R1HPC_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "DS_", "TORCH_", "PYTORCH_", "HF_HOME", "LOADEDMODULES"),
)
_BLOCK = 4096
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", ".*", "*~")


def freeze(
    run: RunDir,
    config: RunConfig,
    argv: Sequence[str],
    overrides: Sequence[str],
    shared: RunDir | None = None,
) -> None:
    """Write config.yaml, code/ (custom code in code/plugins/) and environment.json into a run folder.

    `argv` and `overrides` are recorded redacted. The code is copied, or linked from `shared`, where it was
    frozen before. Raise ConfigError if a value of the configuration or a file of the code holds a secret.
    """
    known = secret_values(os.environ)
    if shared is not None:
        run.code.symlink_to(os.path.relpath(shared.code, run.path))
        git = read_object(shared.environment).get("git")
    else:
        with ThreadPoolExecutor(1) as pool:  # git answers while the code is copied
            answer = pool.submit(_describe_git, load.assets("jobs").parent, known)
            _copy_code(run.code, names_in(config), known)
        git, diff = answer.result()
        if diff:
            write_atomic(run.code / "diff.patch", diff)
        plugins.freeze_files(files_in(config), run.code)
    write_json(run.environment, {**_describe_process(argv, overrides, known), "git": git})
    load.save(config, run.config)  # last: a folder with a configuration is complete


def size_of_copy() -> int:
    """Return the least bytes of the frozen code, in blocks of 4 KiB as on most file systems."""
    package = Path(load.__file__).resolve().parent.parent
    folders = [package, *(folder for folder in map(load.assets, _ASSETS) if package not in folder.parents)]
    walks = (os.walk(folder) for folder in folders)
    files = ((Path(top), names) for walk in walks for top, _, names in walk)
    kept = (top / name for top, names in files for name in set(names) - _SKIPPED(str(top), names))
    return sum(-(-path.stat().st_size // _BLOCK) * _BLOCK for path in kept)


def _copy_code(target: Path, own: Sequence[str], known: Sequence[str]) -> None:
    """Copy the package, the declarative folders it reads, and the user's custom code.

    No links: later edits must not reach the run.
    """

    def copy(source: str, place: str) -> None:
        with open(source, "rb", buffering=0) as file:
            content = file.read()
        text = content.decode(errors="replace")
        kind = find_secret(text, known)
        if kind is None and (name := find_written_out(text, is_code=source.endswith(".py"))):
            kind = f"a secret ({printable(name)} …)"
        if kind:
            raise ConfigError(
                f"{Path(place).relative_to(target)} holds what looks like {kind}: it would be copied into "
                "the run folder. Take it out of the code, then submit again"
            )
        with open(place, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(content)

    package = Path(load.__file__).resolve().parent.parent
    shutil.copytree(package, target / "r1hpc", ignore=_SKIPPED, copy_function=copy)
    for name in _ASSETS:
        folder = load.assets(name)
        if folder.is_dir() and package not in folder.parents:  # when installed, they are inside the package
            shutil.copytree(folder, target / name, ignore=_SKIPPED, copy_function=copy)
    plugins.freeze_plugins(own, target, copy)
    for path, _, _ in os.walk(target):
        Path(path).chmod(0o700)


def _describe_git(checkout: Path, known: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Return commit, branch, remote and the redacted diff to the commit; None outside a repository."""
    questions = {
        "status": ("status", "--porcelain=v2", "--branch", "--untracked-files=normal"),
        "remote": ("remote", "get-url", "origin"),
        "diff": ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--"),
    }
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = pool.map(lambda question: _git(checkout, *question), questions.values())
    said = dict(zip(questions, answers, strict=True))
    if said["status"] is None or not (checkout / "r1hpc").is_dir():
        return None, ""
    status, diff = said["status"].splitlines(), said["diff"] or ""
    branch = dict(line.removeprefix("# ").split(" ", 1) for line in status if line.startswith("#"))
    changed = [line for line in status if not line.startswith("#")]
    if len(diff) > _MAX_DIFF_BYTES:
        diff = f"{diff[:_MAX_DIFF_BYTES]}\n(cut after {_MAX_DIFF_BYTES} bytes)\n"
    about = {
        "commit": branch["branch.oid"],
        "branch": redact(branch["branch.head"], known),
        "remote": redact((said["remote"] or "").strip(), known),
        "dirty": bool(changed),
        "untracked": [redact(line.removeprefix("? "), known) for line in changed if line.startswith("?")],
    }
    return about, redact(diff, known)


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _describe_process(argv: Sequence[str], overrides: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    names, prefixes = _RECORDED
    environment = {
        name: redact(value, known)
        for name, value in sorted(os.environ.items())
        if (name in names or name.startswith(prefixes)) and not is_secret_name(name)
    }
    packages: dict[str, str] = {}  # from the names of the metadata folders alone
    for folder in dict.fromkeys(sys.path):
        for path in sorted(Path(folder or ".").glob("*.dist-info")):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            packages.setdefault(name, version)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "directory": redact(str(Path.cwd()), known),
        "argv": [redact(argument, known) for argument in argv],
        "overrides": [redact(item, known) for item in overrides],
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",  # platform() runs uname
        "packages": dict(sorted(packages.items(), key=lambda pair: pair[0].lower())),
        "environment": environment,
    }
