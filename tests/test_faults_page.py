"""tests/faults.md has every fault once, and the tests that it names exist."""

import ast
import re
from pathlib import Path

from tests.runs import CHECKOUT

_ROW = re.compile(r"^\| F(\d+) \|.*\|$", re.MULTILINE)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> dict[int, str]:
    return {int(row[1]): row[0] for row in _ROW.finditer((CHECKOUT / "tests/faults.md").read_text())}


def test_each_fault_has_a_row_with_a_test() -> None:
    assert sorted(rows()) == list(range(1, 49))
    assert [number for number, row in rows().items() if not _TEST.search(row)] == []


def test_the_tests_that_it_names_exist() -> None:
    named = {match.groups() for row in rows().values() for match in _TEST.finditer(row)}
    missing = [f"{path}::{name}" for path, name in sorted(named) if name not in functions_of(CHECKOUT / path)]
    assert missing == []


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
