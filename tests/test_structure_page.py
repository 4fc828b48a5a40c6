"""docs/structure.md names every folder, and every module says what it is for.

python -m tests.test_structure_page        # every module with its first sentence (make modules)
"""

import ast
import re
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structure.md"
_MOST_LINES = 120
_MOST_FILES = 15


def modules() -> list[Path]:
    """Paths from r1hpc/ on: the commands, then folder by folder."""
    found = (ROOT / "r1hpc").rglob("*.py")
    paths = [path.relative_to(ROOT / "r1hpc") for path in found if not path.name.startswith("_")]
    return sorted(paths, key=lambda path: (path.parent.as_posix(), path.name))


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    said = ast.get_docstring(ast.parse((ROOT / "r1hpc" / path).read_text())) or ""
    line = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[^.A-Z])(?<!et al)\. ", line)[0].rstrip(".")


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path) for path in modules() if len(first_sentence(path).split()) < 2]
    assert not silent


def test_every_folder_says_what_it_is_for() -> None:
    folders = {path.parent for path in modules()}
    silent = [str(folder) for folder in folders if len(first_sentence(folder / "__init__.py").split()) < 2]
    assert not silent


def test_the_page_is_short_and_names_every_package() -> None:
    page = PAGE.read_text()
    assert len(page.splitlines()) <= _MOST_LINES
    packages = {path.parts[0] for path in modules() if len(path.parts) > 1}
    assert not [name for name in packages if f"`{name}/`" not in page]


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_a_page_names_only_what_is_there(page: Path) -> None:
    named = re.findall(r"`([a-z_/]+\.py)`", page.read_text())
    assert not [name for name in named if not any(ROOT.glob(f"[rt]*/**/{name}".replace("/tests/", "/")))]


def test_a_folder_has_few_files() -> None:
    for folder, paths in groupby(modules(), lambda path: path.parent):
        count = len(list(paths))
        assert count <= _MOST_FILES or folder == Path(), f"r1hpc/{folder} has {count} files"


def print_modules() -> None:
    """Print every module, folder by folder."""
    for folder, paths in groupby(modules(), lambda path: path.parent.as_posix()):
        print(f"\n{'commands' if folder == '.' else folder + '/'}")
        for path in paths:
            print(f"  {path.name}: {first_sentence(path)}")


if __name__ == "__main__":
    print_modules()
