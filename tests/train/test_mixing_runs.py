"""Whole runs whose sources' weights change: killed around a change they resume to the bit, and are traced."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.base.files import iter_records
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.corpus.build.build import build_dataset
from r1hpc.shard import main as shard
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.corpus.corpus import text, write_recipe
from tests.runs import (
    assert_same_run,
    at,
    held,
    kill_rank,
    submit,
    until_stopped,
    wait_committed,
    wait_over,
    wait_step,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("mixing")]

SIZE: tuple[str, ...] = (
    "--nodes",
    "2",
    "train.num_steps=14",
    "checkpoint.save_every=4",
    "train.global_batch_size=8",
)
SIZE += ("data.seq_len=32", "train.warmup_steps=2", "train.precision=fp32")
SCHEDULE = "data.mix.schedule=[{from_step: 5, weights: {easy: 0, hard: 1}}, {from_step: 8, weights: %s}]"
LATER = "{easy: 0.75, hard: 0.25}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie beside a dataset of two sources: a word that repeats, and noise."""
    folder = tmp_path_factory.mktemp("mixing")
    noise = np.random.default_rng(0)
    for n in range(8):
        for name, content in (("easy", "ab" * 800), ("hard", _letters(noise, 1600))):
            path = folder / name / f"{n}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content + text(n, 3))
    sources = [{"name": name, "kind": "text", "root": name, "glob": "*.txt"} for name in ("easy", "hard")]
    recipe = write_recipe(folder, sources=sources, mix={"weights": {"easy": 1, "hard": 1}})
    build_dataset(recipe, folder / "data")
    return folder


def _letters(noise: np.random.Generator, count: int) -> str:
    return noise.integers(97, 123, count).astype(np.uint8).tobytes().decode()


def begin(root: Path, name: str, *words: str, env: Any = None) -> RunDir:
    return submit(root, name, *SIZE, f"data.path={root / 'data'}", *words, env=env).run


@pytest.fixture(scope="module")
def scheduled(root: Path) -> RunDir:
    run = begin(root, "scheduled", SCHEDULE % LATER)
    assert [a.cause for a in wait_over(run)] == [Cause.finished]
    return run


def shares(run: RunDir) -> list[tuple[float, float]]:
    """mix_easy and mix_hard of each step."""
    steps = read_steps(run).effective.values()
    return [(step.value("mix_easy"), step.value("mix_hard")) for step in steps]


def sources_of(run: RunDir, capsys: pytest.CaptureFixture[str], step: int) -> Counter[str]:
    """Which source each row of a global batch is from, as `shard trace` says."""
    found: Counter[str] = Counter()
    for rank in range(2):
        for row in range(4):
            where = ("--run", str(run.path), "--step", str(step), "--rank", str(rank), "--row", str(row))
            assert shard(["trace", str(run.path.parent / "data"), *where, "--json"]) == 0
            documents = json.loads(capsys.readouterr().out)["documents"]
            found.update({document["source"] for document in documents})
    return found


def test_a_schedule_is_on_record_and_traced(scheduled: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert shares(scheduled) == [(0.5, 0.5)] * 4 + [(0.0, 1.0)] * 3 + [(0.75, 0.25)] * 7
    events = [e for e in iter_records(scheduled.metrics / "events.jsonl") if e["event"] == "mix"]
    assert [(e["from_step"], e["weights"]) for e in events] == [
        (5, {"easy": 0.0, "hard": 1.0}),
        (8, {"easy": 0.75, "hard": 0.25}),
    ]
    newest = CheckpointStore(scheduled.checkpoints).list()[0].manifest.meta["mix"]
    assert newest["changes"] == [[32, [0.0, 1.0]], [56, [0.75, 0.25]]]
    assert newest["order_id"] == events[-1]["order_id"]
    for step, wanted in ((4, (4, 4)), (5, (0, 8)), (7, (0, 8)), (8, (6, 2))):
        found = sources_of(scheduled, capsys, step)
        assert (found["easy"], found["hard"]) == wanted


def test_killed_around_a_change_it_is_the_same_run(root: Path, scheduled: RunDir) -> None:
    # Attempt 1 waits before step 7, and attempt 2, which goes on at 5, before step 10.
    killed, signalled = root / "killed-1", root / "signalled-2"
    env = at(held(killed, 7, rank=0), held(signalled, 6, rank=1, attempt=2))
    run = begin(root, "killed", SCHEDULE % LATER, "limits.max_crashes=2", env=env)
    wait_step(run, 6)
    wait_committed(run, 4)
    kill_rank(run, 1, signal.SIGKILL)  # back to step 4, in front of the first change
    killed.touch()
    wait_step(run, 9, attempt=2)
    kill_rank(run, 0, signal.SIGTERM)  # behind the second
    signalled.touch()
    attempts = wait_over(run)
    assert [a.cause for a in attempts] == [Cause.crash, Cause.preempted, Cause.finished]
    assert_same_run(run, scheduled)
    assert shares(run) == shares(scheduled)


def test_what_has_not_begun_can_be_changed_at_a_resume_and_what_has_cannot(root: Path) -> None:
    run = begin(root, "changed", SCHEDULE % LATER, env=until_stopped(root / "changed", 6))
    wait_step(run, 5)
    run.stop.touch()
    wait_over(run)
    stopped = read_steps(run).effective
    assert max(stopped) == 6
    submit(root, "changed", "--resume", "data.mix.schedule=[{from_step: 4, weights: {easy: 0, hard: 1}}]")
    attempts = wait_over(run)
    assert attempts[-1].cause is Cause.refused
    assert "easy 0, hard 1, and data.mix.schedule says otherwise: only what begins at" in attempts[-1].detail
    submit(root, "changed", "--resume", SCHEDULE % "{easy: 1, hard: 0}")
    assert wait_over(run)[-1].cause is Cause.finished
    assert shares(run) == [(0.5, 0.5)] * 4 + [(0.0, 1.0)] * 3 + [(1.0, 0.0)] * 7
    assert all(read_steps(run).effective[step].loss == stopped[step].loss for step in stopped)
