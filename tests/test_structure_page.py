"""The list of modules in docs/structure.md is what the modules say of themselves.

python -m tests.test_structure_page        # write it anew
"""

import ast
import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structure.md"
_HEADING = "## Every module, in its own words\n"


def modules() -> list[Path]:
    """Paths from r1hpc/ on: the commands, then package by package."""
    found = (ROOT / "r1hpc").rglob("*.py")
    paths = [path.relative_to(ROOT / "r1hpc") for path in found if not path.name.startswith("_")]
    return sorted(paths, key=lambda path: (path.parent.as_posix(), path.name))


def first_sentence(path: Path) -> str:
    """Of the module's docstring: its first line, up to the end of a sentence."""
    said = ast.get_docstring(ast.parse((ROOT / "r1hpc" / path).read_text())) or ""
    line = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[^.A-Z])(?<!et al)\. ", line)[0].rstrip(".")


def index() -> str:
    """The section of the page, with its heading."""
    lines = [_HEADING]
    for folder, paths in groupby(modules(), lambda path: path.parent.as_posix()):
        lines += ["", f"**{'commands' if folder == '.' else folder + '/'}**", ""]
        lines += [f"- `{path.name}`: {first_sentence(path)}" for path in paths]
    return "\n".join(lines).replace(_HEADING + "\n", _HEADING) + "\n"


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path) for path in modules() if len(first_sentence(path).split()) < 2]
    assert not silent


def test_the_page_is_in_step() -> None:
    _, heading, rest = PAGE.read_text().partition(_HEADING)
    assert heading + rest == index(), "python -m tests.test_structure_page writes it anew"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(_HEADING)[0] + index())
