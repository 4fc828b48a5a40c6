"""Helpers of the task tests: completions, and a look at the processes that are left."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def children() -> set[int]:
    """Processes started by this one that exist, zombies included."""
    path = Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture
def no_process_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before
