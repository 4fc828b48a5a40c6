"""Provide a run's dataset before its ranks start: data.path, or built from data.recipe or data.traces.

Called by `prepare` on the batch host. A dataset of traces is built once, and fixed for the run's life:

<run_root>/datasets/traces-<hash of inputs and tokenizer>/  the dataset, shared by all runs on these traces
<run>/dataset/          in the run that built it: the recipe, with links to inputs or copies in prompt form
<run>/dataset.json      which dataset the run began with
"""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from r1hpc.attempt.may_begin import MayPassError, NotTheNodeError
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.corpus.recipe import find_recipe

if TYPE_CHECKING:
    from r1hpc.tasks.text.format import PromptForm

_MAX_WORKERS = 8
_IS_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_NOT_THE_USERS = (
    "process died",  # a worker of the build, maybe out of memory
    *map(os.strerror, (errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT)),
    *map(os.strerror, (errno.ENOMEM, errno.EMFILE, errno.EAGAIN)),
)
_HASH_DIGITS = 16


def folder_of_recipe(run: RunDir, recipe: Path) -> Path:
    """Return the folder of a `data.recipe` dataset: beside the runs, shared by all of them."""
    return run.path.parent / "datasets" / recipe.stem


def ensure_dataset(run: RunDir, config: RunConfig) -> Path:
    """Return the dataset's folder: data.path, or built beside the runs from data.traces or data.recipe."""
    if config.data.path is not None:
        return Path(config.data.path)
    if config.data.traces:
        return ensure_traces(run, config)
    assert config.data.recipe is not None, "DataConfig refuses neither"
    recipe = find_recipe(config.data.recipe)
    target = folder_of_recipe(run, recipe)
    refuse_foreign(target, config)
    build(recipe, target)
    return target


def refuse_foreign(target: Path, config: RunConfig) -> None:
    """Raise R1hpcError for a dataset beside the runs that another user made or could replace: in a shared run
    root anybody can make a folder of this name."""
    for folder in (target.parent, target):
        status = folder.stat() if folder.exists() else None
        if status is None or config.cluster.trust_shared_run_root:
            continue
        is_open = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if is_open or status.st_uid not in (os.getuid(), 0):
            whose = "every user may write" if is_open else f"user {status.st_uid} made"
            raise R1hpcError(
                f"{whose} {folder}, so its data is not used: choose another --run-root, "
                "have the folder removed, or set cluster.trust_shared_run_root=true"
            )


class _Dataset(TypedDict):
    path: str


def ensure_traces(run: RunDir, config: RunConfig) -> Path:
    """Return the dataset folder of config.data.traces, built on first use. Raise MayPassError if a file is
    not there: another node may see it; R1hpcError if it cannot be built, or the traces have changed since the
    run began."""
    # Deferred: only a run on traces needs numpy and tokenizers on the batch host.
    from r1hpc.corpus.build.from_traces import (
        in_terms_of_inputs,
        inputs_hash,
        list_inputs,
        write_trace_recipe,
    )
    from r1hpc.data.format.manifest import digest
    from r1hpc.tasks.text.tokenizer import form_of, load_tokenizer, special_ids

    record = run.path / "dataset.json"
    known = Path(read_json(record, _Dataset)["path"]) if record.exists() else None
    try:
        inputs = list_inputs(config.data.traces)
    except UsageError as error:
        if known is not None and known.is_dir():
            return known  # the files are not needed once the dataset is there
        if not all(Path(path).exists() for path in config.data.traces):
            raise MayPassError(str(error)) from None  # another node may see them
        raise
    own = load_tokenizer(config.model)
    eos_id, form = special_ids(own, config.model).eos, form_of(own, config.model)
    with _tokenizer(config.model) as tokenizer:
        name = inputs_hash(inputs, tokenizer, eos_id)
        name = name if form.is_plain else digest([name, form.id])
        target = run.path.parent / "datasets" / f"traces-{name[:_HASH_DIGITS]}"
        if known is not None and known.name == target.name and known.is_dir():
            target = known  # the run root may have moved or be a link
        elif known is not None and known.name != target.name:
            raise R1hpcError(
                f"the traces or the tokenizer of {run.run_id} have changed since it began with {known}: "
                f"put the old ones back, or begin a new run (on the old ones: data.traces=[] "
                f"data.path={known})"
            )
        refuse_foreign(target, config)
        if _is_whole(target):  # named by content; rewriting the traces may take minutes
            write_json(record, {"path": str(target)})
            return target
        rewrite = None if form.is_plain else partial(_rewrite, form)
        recipe = write_trace_recipe(inputs, tokenizer, eos_id, run.path / "dataset", rewrite)
    try:
        build(recipe, target)
    except R1hpcError as error:
        raise type(error)(in_terms_of_inputs(str(error), inputs, recipe.parent)) from None
    write_json(record, {"path": str(target)})
    return target


def _is_whole(target: Path) -> bool:
    """True if `build` would find the dataset complete, with no leftovers to clear away."""
    from r1hpc.corpus.engine.work_dir import work_folder
    from r1hpc.data.format.errors import DataError
    from r1hpc.data.format.manifest import read_manifest

    if work_folder(target).exists():
        return False
    try:
        read_manifest(target).check_census()
    except DataError:  # build reports what is wrong
        return False
    return True


def _rewrite(form: "PromptForm", source: Path, target: Path) -> None:
    """Copy a file of traces line by line, each in the model's prompt form."""
    from r1hpc.corpus.sources.lines import open_file, parse_trace

    with open_file(source) as lines, target.open("wb") as out:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    prompt, completion = (text.decode() for text in parse_trace(line))
                    said = {"prompt": form.prompt(prompt), "completion": form.completion(completion)}
                except (UsageError, ValueError) as error:
                    raise UsageError(f"{source}:{number}: {error}") from None
                line = json.dumps(json.loads(line) | said).encode() + b"\n"
            out.write(line)


def build(recipe: Path, target: Path) -> None:
    """Run `shard build` in a separate process, so that zarr's threads do not outlive it. Raise R1hpcError
    with its output; MayPassError if another try or node may succeed, NotTheNodeError if the disk is full."""
    workers = str(min(_MAX_WORKERS, len(os.sched_getaffinity(0))))
    command = [sys.executable, "-m", "r1hpc.shard", "build", str(recipe), "--out", str(target)]
    command += ["--workers", workers, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()
        # A command that refuses its input ends so; else it was killed, crashed, or met a faulty node.
        refused = done.returncode in (1, 2) and said and said.splitlines()[-1].startswith("error: ")
        kind: type[R1hpcError] = MayPassError
        if refused and not any(words in said for words in _NOT_THE_USERS):
            kind = R1hpcError
        kind = NotTheNodeError if any(words in said for words in _IS_FULL) else kind
        raise kind(f"the dataset could not be built from {recipe}: {said or f'status {done.returncode}'}")


@contextlib.contextmanager
def _tokenizer(model: ModelConfig) -> Iterator[Path]:
    """Yield the model's tokenizer.json; for the built-in one a temporary copy."""
    from r1hpc.tasks.text.tokenizer import CHARACTERS, character_tokenizer, tokenizer_file

    if model.tokenizer != CHARACTERS:
        yield tokenizer_file(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        character_tokenizer().save(str(path))
        yield path
