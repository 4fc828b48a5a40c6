"""Make a recipe from files of traces and a tokenizer, for a run that names traces instead of a dataset.

    inputs = list_inputs(["runs/teach/traces.jsonl", "curated/"])
    name = inputs_hash(inputs, tokenizer, eos_id)           # the same files have the same hash in any folder
    recipe = write_trace_recipe(inputs, tokenizer, eos_id, folder)

`folder` then holds recipe.yaml, tokenizer/ and inputs/<n>/ with links to the files of the n-th input, so
neither the recipe nor the dataset depends on where the files lie.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from r1hpc.base.errors import UsageError
from r1hpc.base.files import files_of_lines, write_atomic
from r1hpc.corpus.recipe import TRACES
from r1hpc.corpus.sources.lines import is_compressed
from r1hpc.data.format.manifest import TOKENIZER, digest, file_digest

RECIPE = "recipe.yaml"
REWRITTEN = ".jsonl"
"""Suffix of a compressed input's name: rewritten files are not compressed."""
_MIN_SHARD, _MAX_SHARD = 2**13, 2**24
_CHUNK = 2**15
_PART_BYTES = 2**26
TraceInput = tuple[Path, ...]
"""The files of an entry of data.traces, in order."""


def list_inputs(paths: Sequence[str], key: str = "data.traces") -> list[TraceInput]:
    """Return each path's files: itself, or a folder's *.jsonl (no subfolders), also compressed, by name.

    Raise UsageError for a missing path, or a folder without any; `key` is the setting in its message.
    """
    inputs: list[TraceInput] = []
    for path in (Path(name).absolute() for name in paths):
        if not path.is_file() and not path.is_dir():
            raise UsageError(f"{key}: {path} is not there; name JSONL files or folders of them")
        files = (path,) if path.is_file() else tuple(files_of_lines(path))
        if not files:
            raise UsageError(f"{key}: the folder {path} holds no *.jsonl")
        inputs.append(files)
    return inputs


def inputs_hash(inputs: Sequence[TraceInput], tokenizer: Path, eos_id: int) -> str:
    """Return a sha256 over the content and names of all inputs, the tokenizer and the dataset's layout."""
    files = [[[name, file_digest(path)] for name, path in _named(files)] for files in inputs]
    return digest({"recipe": _recipe(inputs, eos_id), "files": files, "tokenizer": file_digest(tokenizer)})


def write_trace_recipe(
    inputs: Sequence[TraceInput],
    tokenizer: Path,
    eos_id: int,
    folder: Path,
    rewrite: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Create `folder` anew and return the recipe in it, for build_dataset; UsageError without a tokenizer.

    `rewrite` writes (from a file, to another) the traces in the model's form; None: as they are.
    """
    # With numpy, which a submission lists its inputs without.
    from r1hpc.corpus.build.vocabulary import existing_files

    shutil.rmtree(folder, ignore_errors=True)
    for number, files in enumerate(inputs):
        links = folder / _root(number)
        links.mkdir(parents=True)
        for name, path in _named(files):
            if rewrite is None:
                (links / name).symlink_to(path)
            else:
                rewrite(path, links / _rewritten(name))
    (folder / TOKENIZER).mkdir()
    for name, raw in existing_files(tokenizer).items():
        (folder / TOKENIZER / name).write_bytes(raw)
    write_atomic(folder / RECIPE, yaml.safe_dump(_recipe(inputs, eos_id), sort_keys=False))
    return folder / RECIPE


def in_terms_of_inputs(said: str, inputs: Sequence[TraceInput], folder: Path) -> str:
    """Rewrite a build's error about the recipe in `folder` for the user's files: rewritten files have the
    same lines, and on_invalid is no setting of a run."""
    for number, files in enumerate(inputs):
        for name, path in _named(files):
            said = said.replace(f"{folder.absolute() / _root(number) / _rewritten(name)}:", f"{path}:")
    return re.sub(r"set on_invalid: skip for source traces-\d+", "leave it out", said)


def _named(files: TraceInput) -> list[tuple[str, Path]]:
    """Return each file with the name of its link: sorts as the files do, never hidden."""
    return [(f"{number:05d}-{path.name}", path) for number, path in enumerate(files)]


def _rewritten(name: str) -> str:
    return f"{name}{REWRITTEN if is_compressed(name) else ''}"


def source_names(num_inputs: int) -> list[str]:
    """Return the names of data.traces' entries as sources of the dataset."""
    return [f"traces-{number}" for number in range(num_inputs)]


def _root(number: int) -> str:
    return f"inputs/{number}"


def _recipe(inputs: Sequence[TraceInput], eos_id: int) -> dict[str, Any]:
    num_bytes = sum(path.stat().st_size for files in inputs for path in files)
    # About one shard: a writer holds a complete one in memory, and pads the last.
    shard = min(_MAX_SHARD, max(_MIN_SHARD, 1 << max(0, num_bytes - 1).bit_length()))
    return {
        "name": "traces",
        "tokenizer": {"kind": "path", "path": TOKENIZER, "eos_id": eos_id},
        "sources": [
            {"name": name, "kind": TRACES, "root": _root(number), "glob": "*"}
            for number, name in enumerate(source_names(len(inputs)))
        ],
        "chunk_tokens": min(_CHUNK, shard),
        "shard_tokens": shard,
        "part_bytes": _PART_BYTES,
    }
