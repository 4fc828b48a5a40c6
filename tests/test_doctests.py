"""The examples in docstrings are run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "r1hpc"

_WITH_EXAMPLES = sorted(
    path for path in PACKAGE.rglob("*.py") if re.search(r"^ *>>> ", path.read_text(), re.M)
)


@pytest.mark.parametrize("path", _WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_are_true(path: Path) -> None:
    name = ".".join(["r1hpc", *path.relative_to(PACKAGE).with_suffix("").parts])
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples() -> None:
    assert len(_WITH_EXAMPLES) >= 5
