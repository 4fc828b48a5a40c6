"""A script killed by SIGKILL at random moments, saves included: what it was told is saved is found again."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.client.job import Job
from tests.runs import CHECKOUT
from tests.script.test_script import SCRIPTS


@pytest.mark.parametrize(
    "kills", [20, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(5400)])]
)
def test_no_half_checkpoint_is_resumed_and_no_whole_one_lost(kills: int, tmp_path: Path) -> None:
    run, store = RunDir(tmp_path), CheckpointStore(tmp_path / "checkpoints")
    dice, acknowledged, resumed_after_kill = random.Random(kills), 0, 0
    for number in range(1, kills + 1):
        token = f"{number:016x}"
        store.begin(number, token)
        run.attempt_dir(number).mkdir(parents=True)
        job = Job(str(tmp_path), number, token, 0, 1, 0, 1, 2, 0, {})
        log = tmp_path / "out.txt"
        with log.open("w") as file:
            script = subprocess.Popen(
                [sys.executable, str(SCRIPTS / "saves_often.py")],
                env={**os.environ, **job.to_environ(), "PYTHONPATH": str(CHECKOUT)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        lines, deadline = dice.randint(0, 6), time.monotonic() + 60
        while log.read_text().count("\n") < lines and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.1))
        script.send_signal(signal.SIGKILL)
        assert script.wait() == -signal.SIGKILL, log.read_text()
        printed = log.read_text()
        if found := re.search(r"^resumed (\d+)$", printed, re.M):
            assert int(found[1]) >= acknowledged, printed
            resumed_after_kill += int(found[1]) > 0
        saved = [int(step) for step in re.findall(r"^saved step (\d+)$", printed, re.M)]
        acknowledged = max([acknowledged, *saved])
    print(f"{kills} kills, {acknowledged} saves acknowledged, {resumed_after_kill} times resumed")
    assert resumed_after_kill > kills / 4
