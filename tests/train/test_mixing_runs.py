"""Whole runs whose sources' weights change: killed around a change they resume to the bit, and are traced."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.files import iter_records
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.reader import open_dataset
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


def test_a_document_leads_back_to_the_steps_that_saw_it(
    scheduled: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    data = scheduled.path.parent / "data"
    first = open_dataset(data).documents[0]
    assert first.source == "easy"
    assert (
        shard(["trace", str(data), "--run", str(scheduled.path), "--doc", "0", "--steps", "14", "--json"])
        == 0
    )
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps, "six of eight samples of the last steps are from eight documents"
    assert not {5, 6, 7} & set(steps), "its source rested"


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


# --- online -----------------------------------------------------------------------------------------

ONLINE: tuple[str, ...] = (
    "data.mix.online=odm",
    "data.mix.every=4",
    "data.mix.smoothing=0.5",
    "train.num_steps=20",
)
ONLINE += ("train.lr=1e-2",)


@pytest.fixture(scope="module")
def online(root: Path) -> RunDir:
    run = begin(root, "online", *ONLINE)
    assert [a.cause for a in wait_over(run)] == [Cause.finished]
    return run


def test_online_the_hard_source_gains_and_the_easy_one_loses(online: RunDir) -> None:
    steps = read_steps(online).effective
    assert steps[20].value("loss_easy") < steps[20].value("loss_hard") - 0.5, "planted so"
    hard = [steps[step].value("mix_hard") for step in range(1, 21)]
    assert hard[:4] == [0.5] * 4
    assert all(len(set(hard[start : start + 4])) == 1 for start in range(0, 20, 4)), "between checkpoints"
    assert all(share > 0.52 for share in hard[16:])
    for step in steps.values():
        seen = 8 * step.value("mix_hard"), 8 * step.value("mix_easy")
        means = step.value("loss_hard"), step.value("loss_easy")
        mixed = sum(part * mean for part, mean in zip(seen, means, strict=True)) / 8
        assert mixed == pytest.approx(step.loss, abs=1.0 / 8 * abs(means[0] - means[1]) + 1e-4)


def test_online_its_segments_are_in_the_checkpoint_and_traced(
    online: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = CheckpointStore(online.checkpoints).list()[0].manifest.meta["mix"]
    events = [e for e in iter_records(online.metrics / "events.jsonl") if e["event"] == "mix"]
    assert [first for first, _ in meta["changes"]] == [8 * step for step in range(4, 21, 4)]
    assert [weights for _, weights in meta["changes"]] == [
        [e["weights"]["easy"], e["weights"]["hard"]] for e in events
    ]
    assert meta["order_id"] == events[-1]["order_id"]
    for step in (4, 20):
        share = read_steps(online).effective[step].value("mix_hard")
        assert abs(sources_of(online, capsys, step)["hard"] - 8 * share) < 1
    data = str(online.path.parent / "data")
    with pytest.raises(UsageError, match="its checkpoints know them up to step 24"):
        shard(["trace", data, "--run", str(online.path), "--step", "25"])


def test_online_killed_around_its_changes_it_is_the_same_run(root: Path, online: RunDir) -> None:
    # Attempt 1 waits before step 8, and attempt 2, which goes on at 5, before step 14.
    killed, signalled = root / "online-killed-1", root / "online-signalled-2"
    env = at(held(killed, 8, rank=1), held(signalled, 10, rank=0, attempt=2))
    run = begin(root, "online-killed", *ONLINE, "limits.max_crashes=2", env=env)
    wait_step(run, 7)
    wait_committed(run, 4)
    kill_rank(run, 0, signal.SIGKILL)
    killed.touch()
    wait_step(run, 13, attempt=2)
    kill_rank(run, 1, signal.SIGTERM)
    signalled.touch()
    attempts = wait_over(run)
    assert [a.cause for a in attempts] == [Cause.crash, Cause.preempted, Cause.finished]
    assert_same_run(run, online)
    assert shares(run) == shares(online)


@pytest.mark.soak
def test_online_fine_tuning_sees_the_same_losses_packed_and_padded(root: Path) -> None:
    noise = np.random.default_rng(1)
    for name in ("easy", "hard"):
        digits = noise.integers(0, 10, (48, 30)) if name == "hard" else np.ones((48, 30), np.int64)
        lines = ["".join(map(str, row[: 6 + n % 20])) for n, row in enumerate(digits)]
        pairs = [json.dumps({"prompt": f"{line[:3]}=", "completion": line}) for line in lines]
        (root / f"{name}.jsonl").write_text("\n".join(pairs) + "\n")
    words = (
        "stage=sft",
        "model.tokenizer=characters",
        f'data.traces=["{root}/easy.jsonl","{root}/hard.jsonl"]',
    )
    found = {}
    for packing in ("false", "true"):
        size = (*SIZE, *words, "train.micro_batch_size=2", "data.seq_len=128", f"data.packing={packing}")
        run = submit(root, f"sft-{packing}", *size, *ONLINE, "train.num_steps=12", "train.lr=1e-3").run
        assert [a.cause for a in wait_over(run)] == [Cause.finished]
        found[packing] = list(read_steps(run).effective.values())
    for padded, packed in zip(found["false"], found["true"], strict=True):
        for key in ("loss_traces-0", "loss_traces-1", "mix_traces-0", "mix_traces-1"):
            assert packed.value(key) == pytest.approx(padded.value(key), rel=1e-3)
