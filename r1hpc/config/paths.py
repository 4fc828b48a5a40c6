"""Find the files, models and custom code that a configuration names, and make their paths absolute.

A model may be a Hugging Face Hub name: it is found in the local cache. Nothing is downloaded: the nodes of
most clusters have no network.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.files import matching

if TYPE_CHECKING:  # `estimate --help` loads this module, and must be quick
    from r1hpc.config.schema.run import ModelConfig, RunConfig
    from r1hpc.config.schema.sections import ScriptConfig

FILES = ("file", "jsonl")
"""Names of the task whose questions come from a file."""
TABLES = (".parquet", ".arrow")
KINDS = (".jsonl", *TABLES)
_NOT_OURS = ("reasoning_gym:",)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with paths that also work in the job's start folder.

    A recipe, a tokenizer and a task's file may also be names: they are paths if such a file exists.
    """
    data, model, evaluate, monitor = config.data, config.model, config.evaluate, config.monitor
    recipe = data.recipe if data.recipe is None or not Path(data.recipe).is_file() else _absolute(data.recipe)
    template = model.chat_template
    return dataclasses.replace(
        config,
        data=_with(
            data,
            path=data.path and _full(data.path),
            recipe=recipe,
            traces=list(map(_full, data.traces)),
        ),
        model=_with(
            model,
            path=_folder_of(model.path),
            tokenizer=_absolute(model.tokenizer and local_folder(model.tokenizer)),
            chat_template=_full(template) if has_own_template(model) else template,
        ),
        task=_with(
            config.task,
            name=_absolute_code(config.task.name),
            options=_task_paths(config.task.options),
            mix={label: _task_paths(part) for label, part in config.task.mix.items()},
        ),
        reward=_with(
            config.reward,
            terms={_absolute_code(name): weight for name, weight in config.reward.terms.items()},
        ),
        rl=_with(config.rl, teacher=_folder_of(config.rl.teacher), replay=_absolute(config.rl.replay)),
        workers=_with(config.workers, trainer=_absolute(config.workers.trainer)),
        serve=_with(config.serve, python=_absolute_words(config.serve.python)),
        script=_script_paths(config.script),
        cluster=_with(config.cluster, python=_absolute_words(config.cluster.python)),
        evaluate=_with(
            evaluate,
            path=evaluate.path and _full(evaluate.path),
            sets={label: {**part, "path": _absolute(part["path"])} for label, part in evaluate.sets.items()},
            trained_on=list(map(_full, evaluate.trained_on)),
        ),
        monitor=_with(monitor, prometheus_dir=monitor.prometheus_dir and _full(monitor.prometheus_dir)),
    )


def _full(path: str) -> str:
    return str(Path(path).absolute())


def _with(section: Any, **values: Any) -> Any:
    if all(getattr(section, name) == value for name, value in values.items()):
        return section
    return dataclasses.replace(section, **values)


def _task_paths(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's options, or an entry of task.mix, with absolute paths of its file and custom code."""
    paths: dict[str, Any] = {}
    if "path" in part:
        paths["path"] = _absolute(part["path"])
    if "name" in part:
        paths["name"] = _absolute_code(part["name"])
    if isinstance(part.get("options"), Mapping):
        paths["options"] = _task_paths(part["options"])
    return {**part, **paths}


def _folder_of(name: str | None) -> str | None:
    """Return the absolute path of a model; a Hub name that is not cached stays, to be refused later."""
    folder = name and local_folder(name)
    return folder if not folder or is_hub_name(folder) else _full(folder)


def _absolute_words(words: str | None) -> str | None:
    """Return an interpreter command with an absolute first word; a word without a folder stays."""
    try:
        first, *rest = shlex.split(words or "") or [""]
    except ValueError as error:
        raise ConfigError(f"{words!r} is no command: {error}") from None
    return shlex.join([_full(first), *rest]) if "/" in first else words


def _script_paths(script: ScriptConfig) -> ScriptConfig:
    if script.path is None:
        return script
    cwd = _full(script.cwd or ".")
    program = None if Path(script.path).is_file() else shutil.which(script.path)
    path = program or _full(script.path)
    return dataclasses.replace(script, path=path, cwd=cwd, python=_absolute_words(script.python))


def _absolute(name: Any) -> Any:
    if not isinstance(name, str) or not name:
        return name
    try:
        exists = matching(Path(name))
    except UsageError:  # a custom task may understand it
        return name
    return _full(name) if exists else name


def named_by(path: Path) -> list[Path]:
    """Return a file, a folder's files, or those matching a pattern in the path's last part; sorted.

    Raise UsageError if it is no pattern, OSError if the folder cannot be listed.
    """
    found = sorted(path.iterdir()) if path.is_dir() else matching(path)
    # `datasets` leaves such caches from map() or filter() beside the data.
    return [file for file in found if not (file.suffix == ".arrow" and file.name.startswith("cache-"))]


def of_one_kind(path: Path) -> list[Path]:
    """Return the files of `named_by`; of a folder only Arrow, else only Parquet, else only JSON lines."""
    named = named_by(path)
    if not path.is_dir():
        return [file for file in named if file.is_file()]
    kinds = ([file for file in named if file.suffix == kind] for kind in reversed(KINDS))
    return next(filter(None, kinds), [])


def files_in(config: RunConfig) -> dict[str, list[Path]]:
    """Return every path by which task options or the stage's tests name files, with these files.

    A custom task's options are its own: of these only plain files count.
    """
    task = config.task
    parts = [(task.name, task.options)]
    parts += [(part.get("name", task.name), part.get("options", {})) for part in task.mix.values()]
    questions = [options.get("path") for name, options in parts if name in FILES]
    if config.stage in ("rl", "evaluate"):
        evaluate = config.evaluate
        questions += [evaluate.path, *(part["path"] for part in evaluate.sets.values())]
    found = {path: of_one_kind(path) for each in questions if (path := _path(each)) is not None}
    named = [value for _, options in parts for value in options.values()]
    # os.path: a text, such as a template, may be longer than a path, and Path raises on that.
    plain = [path for each in named if (path := _path(each)) is not None and os.path.isfile(path)]  # noqa: PTH113
    found |= {path: [path] for path in plain}
    return {str(path): files for path, files in found.items() if files}


def _path(value: Any) -> Path | None:
    return Path(value).absolute() if isinstance(value, str) and value else None


def is_own(name: str) -> bool:
    """True if a task or a reward term names custom code."""
    return ":" in name and not name.startswith(_NOT_OURS)


def names_in(config: RunConfig) -> list[str]:
    """Return every custom code name in a configuration, and its own chat template, once."""
    tasks = [config.task.name, *(str(part.get("name", "")) for part in config.task.mix.values())]
    found = list(filter(is_own, [*tasks, *config.reward.terms]))
    if has_own_template(config.model):
        found.append(config.model.chat_template)
    return list(dict.fromkeys(found))


def has_own_template(model: ModelConfig) -> bool:
    """True if the chat template is the user's file."""
    return model.chat_template not in ("auto", "none")


def _absolute_code(name: Any) -> Any:
    """Return `FILE.py:NAME` with an absolute path if the file is here; any other name unchanged."""
    if not isinstance(name, str) or not is_own(name):
        return name
    target, _, attribute = name.rpartition(":")
    return f"{_full(target)}:{attribute}" if target.endswith(".py") else name


def _hub_cache() -> Path:
    """Return huggingface_hub's cache folder (HF_HUB_CACHE in its documentation)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def is_hub_name(name: str) -> bool:
    """True if `name` can only be a name on the Hub: owner/name, and no such folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def local_folder(name: str) -> str:
    """Return the cached snapshot of a Hub name: `main`, else the only one. Any other name is unchanged."""
    if not is_hub_name(name):
        return name
    folder = _hub_cache() / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    wanted = main.read_text().strip() if main.is_file() else "*"
    found = list((folder / "snapshots").glob(wanted))
    return str(found[0]) if len(found) == 1 else name


def how_to_fetch(name: str) -> str:
    """Explain how to fetch a Hub name that is not in the cache."""
    target = f"models/{name.split('/')[1]}"
    return (
        f"no such folder here, and as a name on the Hub not in the local cache ({_hub_cache()}); on the "
        f"login node: `hf download {name}`, or with `--local-dir {target}` for model.path={target}"
    )
