"""A folder in memory, for tests that save hundreds of times."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """As tmp_path, on tmpfs where there is one: a killed process loses nothing there that a disk keeps.

    What a power loss takes is another matter, which neither this nor tmp_path can show.
    """
    if not _MEMORY.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="r1hpc-test-", dir=_MEMORY))
    yield folder
    shutil.rmtree(folder)
