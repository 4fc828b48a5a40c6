"""The ways that code takes stay short: they are traced, and held to a budget of files and functions.

python -m tests.test_short_ways submission        # [file, function] of each that is called, in order
python -m tests.test_short_ways grpo              # a GRPO step of rank 0: collect and update
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
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from unittest.mock import MagicMock, patch

from r1hpc.base.run_dir import RunDir
from r1hpc.config import load

ROOT = Path(__file__).parents[1]
_PACKAGE = f"{ROOT / 'r1hpc'}{os.sep}"
_SMALL = (
    *("resources.ranks_per_node=1", "train.num_steps=4", "train.global_batch_size=32"),
    *("checkpoint.save_every=100", "evaluate.every=0"),
)


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


def submission() -> list[tuple[str, str]]:
    """Trace the second submission of a process: modules are loaded and earlier runs are read."""
    _submit()
    return list(functions_called(_submit))


def grpo() -> list[tuple[str, str]]:
    """Trace the third step of a run on one rank: a new rollout and the update on it."""
    from r1hpc.train.parallel import distributed

    distributed.choose_accelerator(use_gpu=False)
    distributed.attend_at_any_length()
    from r1hpc.attempt.control.stop import StopRequests
    from r1hpc.slurm.rank_env import choose_port
    from r1hpc.train.loop.session import Job
    from r1hpc.train.rl import rl

    listener = choose_port()
    store = distributed.make_store("localhost", listener.getsockname()[1], 1, listener=listener)
    group = distributed.join(0, 0, 1, store, use_gpu=False, waits=contextlib.nullcontext, beat=lambda: None)
    called: list[tuple[str, str]] = []
    take_step = rl.RlStage.take_step

    def traced(stage: rl.RlStage, session: Any, step: int) -> Any:
        if step < 3:
            return take_step(stage, session, step)
        called.extend(functions_called(lambda: take_step(stage, session, step)))
        raise InterruptedError

    with TemporaryDirectory() as folder, patch.object(rl.RlStage, "take_step", traced):
        run = RunDir(Path(folder) / "run")
        run.create()
        config = load.load("rl_smoke", _SMALL)
        job = Job(config, run, group, 1, "token", "n0", None, StopRequests(run, 0), MagicMock())
        with contextlib.suppress(InterruptedError), contextlib.redirect_stdout(sys.stderr):
            rl.run(job)
    return called


def _traced(way: str, tmp_path: Path) -> tuple[set[str], int]:
    """Return the files and the number of functions of a way, traced in a process without Slurm."""
    environ = {**os.environ, "PATH": str(tmp_path), "R1HPC_RUN_ROOT": str(tmp_path / "runs")}
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_short_ways", way]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called = json.loads(done.stdout.splitlines()[-1])
    return {file for file, _ in called}, len(called)


def test_a_submission_is_read_in_forty_files(tmp_path: Path) -> None:
    """73 files and 419 functions in November 2026, before each fact was gathered once."""
    files, num_functions = _traced("submission", tmp_path)
    assert "submission/plan_run.py" in files, "the trace sees the package"
    assert len(files) <= 40, sorted(files)
    assert num_functions <= 280


def test_a_grpo_step_is_read_in_21_files(tmp_path: Path) -> None:
    """Eleven of them in train/; one holds the file format of groups. 33 in November 2026."""
    files, num_functions = _traced("grpo", tmp_path)
    assert {"train/rl/rl.py", "train/rl/collect.py", "train/rl/update.py"} <= files
    assert len([file for file in files if file.startswith("train/")]) <= 11, sorted(files)
    assert len(files) <= 21, sorted(files)
    assert num_functions <= 145


if __name__ == "__main__":
    print(json.dumps({"submission": submission, "grpo": grpo}[sys.argv[1]]()), flush=True)
    os._exit(0)  # threads of torch and DeepSpeed
