"""The store as a state machine: saves, kills, new attempts, prunes and damage in any order.

The model knows which steps were committed and which of them are still good. Whatever happened, the store
has to agree with it.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from r1hpc.checkpoint.fence import SupersededError
from r1hpc.checkpoint.store import CheckpointStore, NoUsableCheckpointError
from tests.checkpoint.harness import (
    DONE,
    FILES,
    KILLED,
    SUPERSEDED,
    WRITE_ERROR,
    fault,
    history,
    holds_what_was_written,
    in_child,
    recorded_failpoints,
    save,
    verified_steps,
)
from tests.checkpoint.test_verification import delete, flip_a_byte, truncate_by_one

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def _points() -> dict[str, list[str]]:
    """The failpoints of each operation."""
    root = Path(tempfile.mkdtemp(prefix="r1hpc-test-", dir=MEMORY))
    store = history(root, 10, 20, 30)
    found = {}
    (root / "step-00000030" / "manifest.json").unlink()
    for name, act in (
        ("save", lambda: save(store, 40, 0)),
        ("replace", lambda: save(store, 30, 0)),
        ("prune", lambda: store.prune([])),
        ("begin", lambda: CheckpointStore(root).begin(1, "t")),
    ):
        with recorded_failpoints() as points:
            act()
        found[name] = points
    shutil.rmtree(root)
    return {**found, "save": sorted({*found["save"], *found["replace"]})}


POINTS = _points()


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="r1hpc-test-", dir=MEMORY))
        self.attempt = 0
        self.step = 0
        self.good: set[int] = set()
        self.bad: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize()
    def start(self) -> None:
        CheckpointStore(self.root).begin(self.attempt, "t")

    def next_attempt(self) -> None:
        self.attempt += 1
        CheckpointStore(self.root).begin(self.attempt, "t")

    @rule()
    def save_the_next_step(self) -> None:
        self.step += 10
        save(CheckpointStore(self.root), self.step, self.attempt)
        self.good.add(self.step)

    @rule(point=st.sampled_from(POINTS["save"]), action=st.sampled_from(["kill9", "eio", "enospc"]))
    def save_with_a_fault(self, point: str, action: str) -> None:
        self.step += 10
        self._faulty_save(self.step, point, action)

    @precondition(lambda self: self.good or self.bad)
    @rule(point=st.sampled_from(POINTS["save"]), action=st.sampled_from(["kill9", "eio"]), data=st.data())
    def save_an_old_step_again_with_a_fault(self, point: str, action: str, data: st.DataObject) -> None:
        self._faulty_save(data.draw(st.sampled_from(sorted(self.good | self.bad))), point, action)

    def _faulty_save(self, step: int, point: str, action: str) -> None:
        root, attempt = self.root, self.attempt
        status = in_child(lambda: save(CheckpointStore(root), step, attempt), fault(point, action))
        assert status in (DONE, KILLED if action == "kill9" else WRITE_ERROR)
        if status == KILLED:
            self.next_attempt()
        if status == DONE or step in verified_steps(CheckpointStore(self.root)):
            assert status != WRITE_ERROR or step in self.good, "a save that failed left a checkpoint"
            self.good.add(step)
            self.bad.discard(step)

    @rule(point=st.sampled_from(POINTS["prune"]))
    def prune_with_a_kill(self, point: str) -> None:
        root, attempt = self.root, self.attempt

        def prune() -> None:
            store = CheckpointStore(root)
            store.open_staging(10**7, attempt, "t")
            store.prune([])

        killed = in_child(prune, fault(point, "kill9")) == KILLED
        expendable = {step for step in self.good | self.bad if step < self._oldest_kept()}
        left = {found.step for found in CheckpointStore(self.root).survey()}
        gone = (self.good | self.bad) - left
        assert gone <= expendable
        assert killed or gone == expendable
        self.good -= gone
        self.bad -= gone
        if killed:
            self.next_attempt()

    def _oldest_kept(self) -> int:
        return sorted(self.good)[-2] if len(self.good) >= 2 else 0

    @rule()
    def the_next_attempt_begins(self) -> None:
        self.next_attempt()

    @rule(point=st.sampled_from(POINTS["begin"]))
    def the_next_attempt_is_killed_as_it_begins(self, point: str) -> None:
        root, attempt = self.root, self.attempt + 1
        in_child(lambda: CheckpointStore(root).begin(attempt, "killed"), fault(point, "kill9"))
        self.next_attempt()

    @precondition(lambda self: self.attempt > 0)
    @rule(back=st.integers(1, 3))
    def an_older_attempt_tries_to_write(self, back: int) -> None:
        root, attempt = self.root, max(0, self.attempt - back)
        self.step += 10
        step = self.step
        assert in_child(lambda: save(CheckpointStore(root), step, attempt)) == SUPERSEDED
        with pytest.raises(SupersededError):
            CheckpointStore(self.root).begin(attempt, "again")

    @precondition(lambda self: self.good)
    @rule(
        name=st.sampled_from([*[name for name in FILES if FILES[name]], "manifest.json"]),
        damage=st.sampled_from([flip_a_byte, delete, truncate_by_one]),
        newest=st.booleans(),
    )
    def damage_one(self, name: str, damage: object, newest: bool) -> None:
        assert callable(damage)
        step = max(self.good) if newest else min(self.good)
        damage(self.root / f"step-{step:08d}" / name)
        self.good.remove(step)
        self.bad.add(step)

    @invariant()
    def the_newest_good_one_is_found(self) -> None:
        store = CheckpointStore(self.root)
        assert {found.step for found in store.survey()} == self.good | self.bad
        if not self.good and self.bad:
            with pytest.raises(NoUsableCheckpointError):
                store.newest_verified()
            return
        newest = store.newest_verified()
        assert (newest.step if newest else None) == max(self.good, default=None)
        assert newest is None or holds_what_was_written(newest)

    @invariant()
    def nothing_committed_is_lost(self) -> None:
        assert set(verified_steps(CheckpointStore(self.root))) == self.good


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=20, suppress_health_check=list(HealthCheck)
)
