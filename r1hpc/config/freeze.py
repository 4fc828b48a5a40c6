"""Freeze what a run is made of into its folder before it is submitted: configuration, code, circumstances.

    freeze(run, config, argv=sys.argv[1:], overrides=["train.lr=1e-4"])

A requeued job runs `code/`, never the working tree, which may have moved on. Nothing that looks like a secret
is written: it is redacted where it is only shown, and refused where the run would have to use it.
"""

import dataclasses
import datetime
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import write_atomic, write_json
from r1hpc.base.names import printable
from r1hpc.base.rundir import RunDir
from r1hpc.config import load
from r1hpc.config.redact import find_secret, is_secret_key, is_secret_name, redact, secret_values
from r1hpc.config.schema import RunConfig

_ASSETS = ("jobs", "configs", "shards", "sbatch")
_GIT_TIMEOUT_S = 20.0
_MAX_DIFF_BYTES = 4 << 20
_RECORDED = (
    ("HOME", "PATH", "USER", "LANG", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "PYTHONPATH"),
    ("R1HPC_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "DS_", "TORCH_", "PYTORCH_", "HF_HOME", "LOADEDMODULES"),
)
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", ".*", "*~")


def freeze(run: RunDir, config: RunConfig, argv: Sequence[str], overrides: Sequence[str]) -> None:
    """Write config.yaml, code/ and environment.json into a run folder that exists.

    Args:
        argv: the command line as given, recorded redacted.
        overrides: the dotted overrides as given, recorded redacted.

    Raises:
        ConfigError: an override, a value of the configuration or a file of the code holds a secret.
    """
    known = secret_values(os.environ)
    _copy_code(run.code)
    _refuse_secrets_in_code(run.code, known)
    checkout = load.assets("jobs").parent
    git, diff = _describe_git(checkout, known)
    if diff:
        write_atomic(run.code / "diff.patch", diff)
    write_json(run.environment, {**_describe_process(argv, overrides, known), "git": git})
    load.save(config, run.config)  # last: a folder with a configuration is a whole one


def refuse_secrets(config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse a configuration that would have to carry a secret in the clear, before anything is written.

    Raises:
        ConfigError: names the key, never the value.
    """
    known = secret_values(os.environ)
    for name in config.cluster.environment:
        if is_secret_name(name):
            raise ConfigError(
                f"cluster.environment.{printable(name)} would write a secret into the run folder: leave it "
                "in the file its library reads (~/.netrc, $HF_HOME/token), or read it in a cluster.setup line"
            )
    for item in overrides:
        key, _, value = item.partition("=")
        kind = find_secret(value, known)
        if kind:
            raise ConfigError(f"the value of {printable(key)} looks like {kind}: a run folder must hold none")
    _refuse_in(dataclasses.asdict(config), "", known)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with paths that mean the same in the folder where the job will start.

    A recipe, a tokenizer and a task's file may also be names: they are paths where such a file exists.
    """
    data, model, task = config.data, config.model, config.task
    recipe = data.recipe if data.recipe is None or not Path(data.recipe).is_file() else _absolute(data.recipe)
    options = {
        **task.options,
        **({"path": _absolute(task.options["path"])} if "path" in task.options else {}),
    }
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            path=data.path and str(Path(data.path).absolute()),
            recipe=recipe,
            traces=[str(Path(path).absolute()) for path in data.traces],
        ),
        model=dataclasses.replace(
            model,
            path=model.path and str(Path(model.path).absolute()),
            tokenizer=_absolute(model.tokenizer),
        ),
        task=dataclasses.replace(task, options=options),
    )


def _absolute(name: Any) -> Any:
    """The absolute path of what exists here; anything else is a name, or nothing, and stays."""
    exists = isinstance(name, str) and name and Path(name).exists()
    return str(Path(name).absolute()) if exists else name


def _refuse_in(value: Any, key: str, known: Sequence[str]) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_in(item, f"{key}.{name}" if key else str(name), known)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_in(item, key, known)
    elif isinstance(value, str) and value and (kind := _kind(key, value, known)):
        raise ConfigError(f"the value of {printable(key)} looks like {kind}: a run folder must hold none")


def _kind(key: str, value: str, known: Sequence[str]) -> str | None:
    return "a secret, by its name" if is_secret_key(key) else find_secret(value, known)


def _copy_code(target: Path) -> None:
    """Copy the package and the declarative folders it reads. No links: later edits must not reach the run."""
    package = Path(load.__file__).resolve().parent.parent
    shutil.copytree(package, target / "r1hpc", ignore=_SKIPPED, copy_function=_copy_private)
    for name in _ASSETS:
        folder = load.assets(name)
        if folder.is_dir() and package not in folder.parents:  # installed, they lie inside the package
            shutil.copytree(folder, target / name, ignore=_SKIPPED, copy_function=_copy_private)
    for folder in (target, *target.rglob("*/")):
        folder.chmod(0o700)


def _copy_private(source: str, target: str) -> str:
    shutil.copyfile(source, target)
    Path(target).chmod(0o600)
    return target


def _refuse_secrets_in_code(code: Path, known: Sequence[str]) -> None:
    for path in sorted(code.rglob("*")):
        if path.is_file() and (kind := find_secret(path.read_text(errors="replace"), known)):
            raise ConfigError(
                f"{path.relative_to(code)} holds what looks like {kind}: it would be copied into the run "
                "folder. Take it out of the code, then submit again"
            )


def _describe_git(checkout: Path, known: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Commit, branch, remote and the redacted difference to the commit; None outside a repository."""
    questions = {
        "commit": ("rev-parse", "HEAD"),
        "branch": ("rev-parse", "--abbrev-ref", "HEAD"),
        "remote": ("remote", "get-url", "origin"),
        "status": ("status", "--porcelain", "--untracked-files=normal"),
        "diff": ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--"),
    }
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = pool.map(lambda question: _git(checkout, *question), questions.values())
    said = dict(zip(questions, answers, strict=True))
    if said["status"] is None or not (checkout / "r1hpc").is_dir():
        return None, ""
    status, diff = said["status"].splitlines(), said["diff"] or ""
    if len(diff) > _MAX_DIFF_BYTES:
        diff = f"{diff[:_MAX_DIFF_BYTES]}\n(cut after {_MAX_DIFF_BYTES} bytes)\n"
    about = {
        **{name: redact((said[name] or "").strip(), known) for name in ("commit", "branch", "remote")},
        "dirty": bool(status),
        "untracked": [redact(line[3:], known) for line in status if line.startswith("??")],
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
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "directory": redact(str(Path.cwd()), known),
        "argv": [redact(argument, known) for argument in argv],
        "overrides": [redact(item, known) for item in overrides],
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": _packages(),
        "environment": environment,
    }


def _packages() -> dict[str, str]:
    """Every installed distribution and its version, from the names of their metadata folders alone."""
    found: dict[str, str] = {}
    for folder in dict.fromkeys(sys.path):
        for path in sorted(Path(folder or ".").glob("*.dist-info")):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            found.setdefault(name, version)
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))
