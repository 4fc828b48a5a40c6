"""Read the prompts of a generated source in ranges, and find and hash its teacher.

    for part in prompt_ranges(path, generate): part.start, part.stop, part.digest
    rows = read_prompts(path, generate, prompt_range)     # [("questions.jsonl:12", {"prompt": ...}), ...]
    teacher_folder(recipe, generate)
    TeacherTask(folder).write(...)["sha256"]        # stage `teacher`: read once, by one unit

A range is the prompts of one unit of stage `generate`. Its digest covers the columns that are read: a changed
prompt redoes its own unit, and an appended one none of the earlier units.
"""

import contextlib
import functools
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.hub import how_to_fetch, is_hub_name, local_folder
from r1hpc.corpus.recipe.recipe import Recipe
from r1hpc.corpus.recipe.stages import GenerateRecipe
from r1hpc.corpus.sources.lines import is_compressed, iter_lines, line_number
from r1hpc.data.format.manifest import file_digest

_DIGEST_DIGITS = 32
_PLACE_EVERY = 64

Row = tuple[str, dict[str, Any]]
"""A prompt's place and its columns."""
_KINDS = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")
"""Weights, tokenizer, chat template and configuration; other files of a model's folder do not count."""


@dataclass(frozen=True)
class PromptRange:
    """Prompts `start` to `stop` of a file, counted from 0, and the digest of their content."""

    start: int
    stop: int
    digest: str


def prompt_ranges(path: Path, generate: GenerateRecipe) -> Iterator[PromptRange]:
    """Yield all prompts of a file in the ranges of its units.

    Raises:
        UsageError: the file cannot be read, or a line has no prompt: names it.
    """
    if not path.is_file():
        raise UsageError(f"generate.prompts: {path} is not there; give a file of prompts")
    rows, start = _rows(path, generate, 0), 0
    while part := [row for _, row in islice(rows, generate.prompts_per_unit)]:
        yield PromptRange(start, start + len(part), _digest(part))
        start += len(part)
    if not start:
        raise UsageError(f"generate.prompts: {path} holds no prompt")


def read_prompts(path: Path, generate: GenerateRecipe, part: PromptRange) -> list[Row]:
    """Return the prompts of one range, without reading what precedes it if that length is known.

    Raises:
        UsageError: they differ from those the range was made of.
    """
    found = list(islice(_rows(path, generate, part.start), part.stop - part.start))
    if _digest([row for _, row in found]) != part.digest:
        raise UsageError(f"generate.prompts: {path} has changed since this build began: build again")
    return found


def _digest(rows: list[dict[str, Any]]) -> str:
    said = json.dumps(rows, sort_keys=True, default=str).encode()
    return hashlib.sha256(said).hexdigest()[:_DIGEST_DIGITS]


def _rows(path: Path, generate: GenerateRecipe, first: int) -> Iterator[Row]:
    """Yield the prompts from number `first` on."""
    found = _parquet_rows(path, generate, first) if path.suffix == ".parquet" else _line_rows(path, first)
    most = generate.num_prompts
    for where, row in islice(found, None if most is None else max(0, most - first)):
        yield where, _checked(where, row, generate)


def _line_rows(path: Path, first: int) -> Iterator[Row]:
    places = {0: 0}
    with contextlib.suppress(OSError):  # its reader reports the error
        status = path.stat()
        places = _places(path, status.st_size, status.st_mtime_ns)
    begin = max(number for number in places if number <= first)
    for number, line in enumerate(iter_lines(path, places[begin], None), begin):
        if number % _PLACE_EVERY == 0 and not is_compressed(path.name):
            places[number] = line.position
        if number < first:
            continue
        try:
            if line.fault:
                raise ValueError(line.fault)
            row = json.loads(line.raw)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{line_number(path, line.position)}"
            raise UsageError(f"{where}: not JSON ({error}); prompts are one JSON object a line") from None
        yield f"{path} at {line.position}", row


@functools.lru_cache(maxsize=8)
def _places(path: Path, size: int, mtime_ns: int) -> dict[int, int]:
    """Return the bytes at which some prompts of a file begin, by their number. Filled while the file is read,
    so a process that makes many units reads it once."""
    return {0: 0}


def _parquet_rows(path: Path, generate: GenerateRecipe, first: int) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in generate.columns if name in file.schema_arrow.names]
        groups = range(file.metadata.num_row_groups)
        starts = list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))
        begin = bisect_right(starts, first) - 1
        number = starts[begin]
        for batch in file.iter_batches(1024, list(groups[begin:]), names):
            here = batch.slice(max(0, first - number))
            number += batch.num_rows - here.num_rows
            for row in here.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}") from None


def _checked(where: str, row: Any, generate: GenerateRecipe) -> dict[str, Any]:
    """Return the columns that are read, all of them present and the prompt a text."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a JSON {type(row).__name__}, not an object with {generate.prompt!r}")
    for name in generate.columns:
        if name not in row:
            raise UsageError(
                f"{where}: no column {name!r}{nearest(name, map(str, row))}; name it by generate.prompt, "
                "generate.answer or generate.choices"
            )
    text = row[generate.prompt]
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: {generate.prompt} is {text!r:.60}: a prompt must be text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{where}: {generate.prompt} holds half a surrogate pair, which is no text"
        ) from None
    return {name: row[name] for name in generate.columns}


def teacher_folder(recipe: Recipe, generate: GenerateRecipe) -> Path:
    """Return the folder relative to the recipe, or a Hugging Face Hub snapshot in the local cache.

    Raises:
        UsageError: there is no model folder.
    """
    name = generate.teacher
    folder = recipe.resolve(name)
    if not folder.exists() and is_hub_name(name):
        folder = Path(local_folder(name))
        if not folder.is_dir():
            raise UsageError(f"generate.teacher {name}: {how_to_fetch(name)}")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"generate.teacher: {folder} has no config.json; give the folder of a Hugging Face model"
        )
    return folder


def teacher_files(folder: Path) -> list[Path]:
    """Return the files that decide what the teacher writes, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix in _KINDS and path.name[0] != ".")


def teacher_state(folder: Path) -> list[list[Any]]:
    """Return facts that show, without reading it, whether the folder has changed."""
    found = [(path, path.stat()) for path in teacher_files(folder)]
    return [[str(path.absolute()), status.st_size, status.st_mtime_ns] for path, status in found]


@dataclass(frozen=True)
class TeacherTask:
    """Runs stage `teacher`: hashes a folder, as the lines of `sha256sum` over its files."""

    folder: Path

    def write(self, folder: Path) -> dict[str, Any]:
        lines = [f"{file_digest(path)['sha256']}  {path.name}\n" for path in teacher_files(self.folder)]
        return {"sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
