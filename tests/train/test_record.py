"""The record of stale rollouts: what was written is read; a damaged one is refused by name, never used."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from r1hpc.base.errors import ConfigError, StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.train.checks.off_policy import check_off_policy, files_of_the_record
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rl.collect import Collector
from r1hpc.train.rl.record import policy_of, read_record, write_record
from r1hpc.train.rl.rollout import Rollout
from r1hpc.train.rollout.groups import read_groups, write_groups
from tests.train.test_groups import assert_same, groups

FIRST_ITEM, INDEX = 40, 5
WORDS = ("rl.max_staleness=2", "train.num_steps=12")
WORKERS = {"weights": "weights of version 5"}


def recorded(path: Path, first_item: int = FIRST_ITEM, sources: dict[str, str] | None = None) -> RunDir:
    """A run with the record of rollout 5, which versions 3 and 4 sampled."""
    run = RunDir(path)
    path.mkdir()
    rollout = Rollout(groups(first_item, 4), f"policy of {path.name}", num_items=2, index=INDEX)
    write_record(run, rollout, first_item, sources)
    return run


class Engine:
    """Holds the weights that the recorded run had."""

    def sync_weights(self, policy: str) -> str:
        return policy

    def release(self) -> None:
        pass


def replay(run: RunDir, policy: str = WORKERS["weights"], index: int = INDEX) -> Rollout:
    config = load.load("jobs/rl_smoke.yaml", [*WORDS, f"rl.replay={run.path}"])
    judge: Any = SimpleNamespace(task=None, engine=Engine())
    collector = cast(Any, Collector.__new__(Collector))
    collector._job, collector._judge, collector._policy = SimpleNamespace(config=config), judge, policy
    return cast(Rollout, collector.replay(run, index, FIRST_ITEM))


def test_what_was_recorded_is_read(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    rollout = read_record(run, INDEX, FIRST_ITEM)
    assert_same(rollout.groups, groups(FIRST_ITEM, 4))
    assert (rollout.policy_id, rollout.num_items, rollout.index) == ("policy of run", 2, INDEX)
    assert policy_of(run, INDEX, max_staleness=2) is None
    assert_same(replay(run).groups, rollout.groups)


def test_a_record_of_workers_names_the_weights_trained_from(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", sources=WORKERS)
    assert replay(run).num_items == 2
    with pytest.raises(TrainError, match=r"has other weights than .* so it is no replay"):
        replay(run, "other weights")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def remove(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_run(path: Path) -> None:
    other = recorded(path.parents[2] / "other")
    path.write_bytes((other.trained / path.name).read_bytes())


def written_by_hand(path: Path) -> None:
    """A file of groups that is whole, with other rewards."""
    policy, ours = read_groups(path)
    ours.rewards[:] = 1
    write_groups(path, ours, policy)


@pytest.mark.parametrize(
    "damage", [cut, empty, flip_a_bit, remove, folder, pipe, of_another_run, written_by_hand]
)
def test_a_replay_refuses_damaged_groups_by_name(damage: Callable[[Path], None], tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", sources=WORKERS)
    path = run.record(INDEX).with_suffix(".npz")
    damage(path)
    with pytest.raises(TrainError) as caught:
        replay(run)
    assert f"cannot go on: {path}" in str(caught.value)
    assert "put it back from a copy, or replay another run" in str(caught.value)


@pytest.mark.parametrize("damage", [cut, empty, remove, folder, pipe])
def test_a_replay_refuses_damaged_facts_by_name(damage: Callable[[Path], None], tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", sources=WORKERS)
    damage(run.record(INDEX))
    with pytest.raises(TrainError) as caught:
        replay(run)
    assert f"{run.record(INDEX)}" in str(caught.value)
    assert "put it back from a copy, or replay another run" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sha256", None),
        ("sha256", ["a"]),
        ("sha256", "0" * 64),
        ("num_items", "two"),
        ("num_items", [2]),
        ("num_items", None),
        ("num_items", float("nan")),
        ("num_items", -2),
        ("first_item", {}),
        ("first_item", 41),
        ("rollout", 6),
        ("rollout", None),
        ("staleness_max", None),
        ("policy", 7),
        ("weights", 7),
    ],
)
def test_facts_of_another_kind_are_refused(key: str, value: object, tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", sources=WORKERS)
    facts = json.loads(run.record(INDEX).read_text())
    run.record(INDEX).write_text(json.dumps({**facts, key: value}))
    with pytest.raises(TrainError, match=r"cannot go on: .*000005"):
        replay(run)


@pytest.mark.parametrize("text", ["null", "[]", "7", "{}", '"text"', "[" * 100_000])
def test_facts_that_are_no_record_are_refused(text: str, tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    run.record(INDEX).write_text(text)
    with pytest.raises(TrainError, match=r"cannot go on: .*000005"):
        replay(run)


@pytest.mark.parametrize("text", ["null", "{}", '{"rollout": null, "staleness_max": null}', ""])
def test_a_damaged_record_that_names_these_weights_is_refused(text: str, tmp_path: Path) -> None:
    """Without workers the record of rollout 7 has the id of the weights of version 5."""
    run = recorded(tmp_path / "run")
    run.record(INDEX + 2).write_text(text)
    with pytest.raises(TrainError, match=r"cannot go on: .*000007"):
        replay(run)


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    for suffix in (".json", ".npz"):
        run.record(INDEX).with_suffix(suffix).rename(run.record(INDEX + 1).with_suffix(suffix))
    with pytest.raises(
        StateError, match=r"000006.json is of rollout 5, which begins with item 40; this run's"
    ):
        read_record(run, INDEX + 1, FIRST_ITEM)


@pytest.mark.parametrize("missing", ["000003.json", "000003.npz"])
def test_a_replay_without_a_file_is_refused_before_the_queue(missing: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.trained.mkdir(parents=True)
    load.save(load.load("jobs/rl_smoke.yaml", WORDS), run.config)
    for rollout in range(6):
        for suffix in (".json", ".npz"):
            run.record(rollout).with_suffix(suffix).touch()
    config = load.load("jobs/rl_smoke.yaml", [*WORDS, f"rl.replay={run.path}"])
    check_off_policy(config)
    (run.trained / missing).unlink()
    with pytest.raises(ConfigError, match="has no record of rollout 3; 6 are needed"):
        check_off_policy(config)


def test_the_record_takes_no_more_than_was_said(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", sources=WORKERS)
    num_bytes = sum(path.stat().st_size for path in run.trained.iterdir())
    made = groups(FIRST_ITEM, 4)
    sizes = {
        "num_prompts": len(made.items),
        "num_generations": made.num_members,
        "max_prompt_length": max(map(len, made.prompts)),
        "max_completion_length": made.tokens.shape[1],
    }
    config = load.load("jobs/rl_smoke.yaml", [*WORDS, *(f"rollout.{key}={n}" for key, n in sizes.items())])
    one = load.load("jobs/rl_smoke.yaml", ["rl.max_staleness=0"])
    assert files_of_the_record(one) == []
    [note] = files_of_the_record(config)
    num_files, kib = re.findall(r"[\d.]+", note)[:2]
    num_rollouts = int(num_files) / 2
    assert num_bytes * num_rollouts <= float(kib) * 1024 <= 2.5 * num_bytes * num_rollouts
