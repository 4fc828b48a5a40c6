"""The ways that code takes stay short: a submission is traced, and held to a budget of files and functions.

python -m tests.test_short_ways        # the files and functions of a submission, in order
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
_PACKAGE = f"{ROOT / 'r1hpc'}{os.sep}"
_MOST_FILES, _MOST_FUNCTIONS = 40, 280
"""Of a submission. 73 and 419 in November 2026, before each fact was gathered once."""


def functions_called(work: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Return (file, name) of every function of r1hpc that `work` calls, in order, without comprehensions."""
    called: Counter[tuple[str, str]] = Counter()

    def look(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_PACKAGE) and code.co_name[0] != "<":
            called[code.co_filename.removeprefix(_PACKAGE), code.co_qualname] += 1

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


def _submit() -> None:
    main = import_module("r1hpc.submit").main
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(ROOT / "jobs" / "smoke.yaml"), "--dry-run"]) == 0


def _print_submission() -> None:
    """Trace the second submission of a process: modules are loaded and earlier runs are read."""
    _submit()
    print(json.dumps(list(functions_called(_submit))))


def test_a_submission_is_read_in_forty_files(tmp_path: Path) -> None:
    environ = {**os.environ, "PATH": str(tmp_path), "R1HPC_RUN_ROOT": str(tmp_path / "runs")}  # no Slurm
    command = [sys.executable, "-m", "tests.test_short_ways"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called = json.loads(done.stdout)
    files = {file for file, _ in called}
    assert "submission/plan_run.py" in files, "the trace sees the package"
    assert len(files) <= _MOST_FILES, sorted(files)
    assert len(called) <= _MOST_FUNCTIONS


if __name__ == "__main__":
    _print_submission()
