"""The folder of a teacher: where it lies, and the hash that names what it says.

teacher_folder(recipe, generate)
TeacherTask(folder).write(...)["sha256"]        # stage `teacher`: read once, by one unit
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.config.hub import how_to_fetch, is_hub_name, local_folder
from r1hpc.data.manifest import file_digest
from r1hpc.data.recipe import Recipe
from r1hpc.data.recipe_generate import GenerateRecipe

_KINDS = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")
"""Weights, tokenizer, chat template and configuration; not what else lies in a model's folder."""


def teacher_folder(recipe: Recipe, generate: GenerateRecipe) -> Path:
    """Relative to the recipe, or the snapshot of a name on the Hugging Face Hub in the local cache.

    Raises:
        UsageError: no folder of a model there.
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
    """What decides what the teacher says, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix in _KINDS and path.name[0] != ".")


def teacher_state(folder: Path) -> list[list[Any]]:
    """What tells without reading it whether the folder is the one it was."""
    found = [(path, path.stat()) for path in teacher_files(folder)]
    return [[str(path.absolute()), status.st_size, status.st_mtime_ns] for path, status in found]


@dataclass(frozen=True)
class TeacherTask:
    """Stage `teacher`: the hash of a folder, which is that of the lines of `sha256sum` over its files."""

    folder: Path

    def write(self, folder: Path) -> dict[str, Any]:
        lines = [f"{file_digest(path)['sha256']}  {path.name}\n" for path in teacher_files(self.folder)]
        return {"sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
