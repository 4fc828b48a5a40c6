"""What tests of commands do in one line: run one and read its answer, have a job in the name of a run."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.recorded import RecordedRun

Supervised = tuple[RecordedRun, "subprocess.Popen[str]"]
"""A run and the process that stands for its local supervisor."""


def as_json(command: Any, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one object that a command prints with --json."""
    assert command.main([*argv, "--json"]) in (0, 1)
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one object and nothing else"
    value: dict[str, Any] = json.loads(out)
    return value


def as_text(command: Any, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints for a person: at most 100 columns, paths apart."""
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.strip().startswith("/")) <= 100
    return out


def submit_recorded(cluster: Cluster, made: RecordedRun, *options: str) -> int:
    """A job of the cluster that sleeps in the name of a recorded run; its id."""
    made.run.script.write_text("#!/bin/bash\nexec sleep 300\n")
    argv = ["sbatch", "--parsable", "--output=/dev/null", *options, str(made.run.script)]
    job_id = int(cluster.run(argv).stdout)
    made.clock = time.time()
    made.submit(str(job_id), "slurm")
    made.clock = time.time()
    return job_id


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
