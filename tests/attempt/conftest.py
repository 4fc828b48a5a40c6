"""A job whose attempt ends."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attempt.ending_job import EndingJob


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndingJob]:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr("r1hpc.attempt.end.print_diagnosis", lambda *_: None)
    before = os.umask(0o077)  # launch keeps its files private, and would keep those of the tests after it
    yield EndingJob(tmp_path)
    os.umask(before)
