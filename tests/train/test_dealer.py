"""The dealer: which worker is dealt an item, and which groups count; on real files, with the test's clock."""

from pathlib import Path

import pytest

from r1hpc.train.exchange.dealer import Dealer, Finished
from r1hpc.train.exchange.mailbox import Box, group_path, read_order
from r1hpc.train.exchange.versions import Latest
from tests.train.test_mailbox import commit

SILENCE_S = 30.0


class Scene:
    """A run folder with two workers, which the test plays itself."""

    def __init__(self, run: Path, max_staleness: int = 1, in_flight: int = 2, token: str = "t1") -> None:
        self.run, self.now, self.version = run, 0.0, 0
        self.exchange, self.workers = run / "exchange", run / "workers"
        self.dealer = Dealer(
            self.exchange,
            self.workers,
            token,
            max_staleness=max_staleness,
            in_flight=in_flight,
            silence_s=SILENCE_S,
        )

    def start(self, worker: str, attempt: int = 1, version: int = 0) -> Box:
        """A start of a worker that has been heard twice."""
        box = Box.opened(self.workers / worker, attempt, f"a{attempt}")
        box.version, box.digest = version, f"digest {version}"
        self.round()
        box.beat()
        return box

    def round(self, seconds: float = 1.0) -> list[Finished]:
        self.now += seconds
        latest = Latest(version=self.version, digest=f"digest {self.version}", token="t1")
        return self.dealer.round(latest, self.now)

    def dealt(self, worker: str) -> list[int]:
        order = read_order(self.exchange, worker)
        return [deal["item"] for deal in order["deals"]] if order else []


def items(scene: Scene, rollout: int) -> list[int]:
    return [group.item for group in scene.dealer.finished(rollout)]


def test_items_are_dealt_in_order_up_to_in_flight_and_topped_up(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    first, _ = scene.start("w00"), scene.start("w01")
    scene.dealer.want(0, range(10, 16))
    scene.round()
    assert (scene.dealt("w00"), scene.dealt("w01")) == ([10, 12], [11, 13])
    commit(first, 12)
    scene.round()
    assert (scene.dealt("w00"), scene.dealt("w01")) == ([10, 14], [11, 13])
    assert items(scene, 0) == [12]
    commit(first, 10)
    scene.round()
    assert items(scene, 0) == [10, 12]  # in the order in which they were wanted


def test_nothing_is_dealt_that_would_be_too_old(tmp_path: Path) -> None:
    scene = Scene(tmp_path, max_staleness=1, in_flight=9)
    box = scene.start("w00", version=0)
    for rollout in range(3):
        scene.dealer.want(rollout, [rollout])
    scene.round()
    assert scene.dealt("w00") == [0, 1]
    scene.version = box.version = 1
    box.digest = "digest 1"
    box.beat()
    scene.round()
    assert scene.dealt("w00") == [0, 1, 2]


@pytest.mark.parametrize(("version", "digest"), [(-1, ""), (0, "digest 9"), (3, "digest 3")])
def test_a_worker_without_proven_weights_is_dealt_nothing(tmp_path: Path, version: int, digest: str) -> None:
    scene = Scene(tmp_path)
    box = scene.start("w00")
    box.version, box.digest = version, digest
    box.beat()
    scene.dealer.want(0, [1])
    scene.round()
    assert scene.dealt("w00") == []


def test_items_of_a_silent_worker_go_to_another_and_the_first_group_counts(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    lost, other = scene.start("w00"), scene.start("w01")
    scene.dealer.want(0, [1])
    scene.round()
    assert scene.dealt("w00") == [1]
    for _ in range(4):
        other.beat()
        scene.round(seconds=10)
    assert (scene.dealt("w00"), scene.dealt("w01")) == ([], [1])
    commit(lost, 1)  # it was only stopped, and goes on
    assert scene.round() == []
    commit(other, 1)
    [twin] = scene.round()
    assert (twin.worker, twin.item, twin.is_twin) == ("w01", 1, True)
    [counted] = scene.dealer.finished(0)
    assert counted.path == group_path(lost.folder, 0)


def test_a_clock_of_the_trainer_that_stood_still_costs_no_worker_that_lives(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = scene.start("w00")
    scene.dealer.want(0, [1])
    scene.round()
    box.beat()
    scene.round(seconds=3600)
    assert scene.dealt("w00") == [1]


@pytest.mark.parametrize("how", ["another start", "left"])
def test_items_are_free_at_once_if_their_worker_has_another_start_or_left(tmp_path: Path, how: str) -> None:
    scene = Scene(tmp_path)
    first, second = scene.start("w00"), scene.start("w01")
    scene.dealer.want(0, [1])
    scene.round()
    if how == "left":
        first.left = "stopped"
        first.beat()
    else:
        Box.opened(scene.workers / "w00", 2, "a2")
    second.beat()
    scene.round()
    assert (scene.dealt("w00"), scene.dealt("w01")) == ([], [1])


def test_a_group_of_an_earlier_start_counts_if_nobody_was_first(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = scene.start("w00")
    scene.dealer.want(0, [1])
    scene.round()
    commit(box, 1)
    Box.opened(scene.workers / "w00", 2, "a2")
    scene.round()
    assert items(scene, 0) == [1]


def test_the_item_of_a_rejected_group_is_dealt_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = scene.start("w00")
    scene.dealer.want(0, [1])
    scene.round()
    commit(box, 1)
    assert scene.round() == []
    assert scene.dealer.reject(1, "damaged").dropped == "damaged"
    assert (items(scene, 0), scene.round()) == ([], [])
    order = read_order(scene.exchange, "w00")
    assert order is not None
    assert [(deal["item"], deal["number"]) for deal in order["deals"]] == [(1, 1)]  # another deal
    commit(box, 1)
    scene.round()
    assert items(scene, 0) == [1]


def test_a_start_with_three_rejected_groups_is_dealt_nothing_more(tmp_path: Path) -> None:
    scene = Scene(tmp_path, in_flight=3)
    box = scene.start("w00")
    scene.dealer.want(0, [1, 2, 3])
    scene.round()
    for item in (1, 2, 3):
        commit(box, item)
    scene.round()
    for item in (1, 2, 3):
        scene.dealer.reject(item, "damaged")
    scene.round()
    assert scene.dealt("w00") == []
    scene.start("w00", attempt=2)
    scene.round()
    assert scene.dealt("w00") == [1, 2, 3]


def test_an_item_that_is_given_up_is_dealt_to_nobody_and_its_group_is_a_twin(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = scene.start("w00")
    scene.dealer.want(0, [1, 2])
    scene.round()
    scene.dealer.give_up([1])
    scene.round()
    assert scene.dealt("w00") == [2]
    commit(box, 1)
    assert scene.round() == []
    scene.dealer.settle_before(3)
    [twin] = scene.round()
    assert (twin.item, twin.is_twin) == (1, True)


def two_finished(scene: Scene) -> Box:
    """Have items 1 and 2 of rollout 0 dealt to a worker and committed; return its box."""
    box = scene.start("w00")
    scene.dealer.want(0, [1, 2])
    scene.round()
    commit(box, 1)
    commit(box, 2)
    return box


@pytest.mark.parametrize(("version", "counts"), [(2, False), (3, True), (5, True), (6, False)])
def test_a_group_that_is_too_old_or_from_the_future_is_dropped(
    tmp_path: Path, version: int, counts: bool
) -> None:
    """It can be there after a resume of the trainer, which deals items to other rollouts."""
    scene = Scene(tmp_path, max_staleness=2)
    commit(scene.start("w00"), 1, version=version)
    scene.dealer.want(5, [1])
    dropped = scene.round()
    assert (items(scene, 5) == [1]) == counts
    assert [group.item for group in dropped] == ([] if counts else [1])


def test_a_new_dealer_finds_what_was_finished_and_takes_nothing_twice(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = two_finished(scene)
    again = Scene(tmp_path, token="t2")
    again.dealer.settle_before(2)  # it is on record
    again.dealer.want(0, [2, 3])
    [twin] = again.round()
    assert twin.item == 1
    assert items(again, 0) == [2]
    box.beat()
    again.round()
    order = read_order(again.exchange, "w00")
    assert order is not None
    assert (order["token"], again.dealt("w00")) == ("t2", [3])


def test_a_box_left_behind_is_dealt_nothing_by_a_new_dealer(tmp_path: Path) -> None:
    Scene(tmp_path).start("w00")
    again = Scene(tmp_path)
    again.dealer.want(0, [1])
    again.round()
    again.round()
    assert again.dealt("w00") == []


def test_groups_leave_the_box_once_they_are_settled(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    two_finished(scene)
    for settled, taken in ((0, 0), (2, 1), (3, 2)):
        scene.dealer.settle_before(settled)
        scene.round()
        order = read_order(scene.exchange, "w00")
        assert order is not None
        assert order["taken"] == taken


@pytest.mark.parametrize("how", ["silent", "left", "another start"])
def test_settled_groups_of_a_start_that_is_gone_are_removed(tmp_path: Path, how: str) -> None:
    scene = Scene(tmp_path, in_flight=3)
    box = scene.start("w00")
    scene.dealer.want(0, [1, 2])
    scene.dealer.want(1, [3])
    scene.round()
    for item in (1, 2, 3):
        commit(box, item)
    scene.round()
    if how == "left":
        box.left = "stopped"
        box.beat()
    elif how == "another start":
        Box.opened(scene.workers / "w00", 2, "a2")
    scene.round(seconds=SILENCE_S + 1 if how == "silent" else 1)
    groups = [group_path(box.folder, number) for number in range(3)]
    assert all(path.is_file() for path in groups)  # none is on record
    scene.dealer.settle_before(3)
    assert [path.is_file() for path in groups] == [False, False, True]
    assert items(scene, 1) == [3]
    scene.dealer.settle_before(4)
    assert not groups[2].exists()
    assert Box.opened(scene.workers / "w00", 3, "a3").committed == 3  # it comes back, and counts on


def test_the_groups_of_a_start_that_is_there_are_its_own_to_remove(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = two_finished(scene)
    scene.round()
    scene.dealer.settle_before(3)
    assert group_path(box.folder, 0).is_file()
    scene.round()
    order = read_order(scene.exchange, "w00")
    assert order is not None
    box.forget(order["taken"])
    assert not group_path(box.folder, 0).exists()


def test_a_start_that_was_only_silent_goes_on_after_its_groups_were_removed(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    box = two_finished(scene)
    scene.round()
    scene.round(seconds=SILENCE_S + 1)
    scene.dealer.settle_before(3)
    assert not group_path(box.folder, 0).exists()
    scene.dealer.want(1, [3])
    box.beat()
    scene.round()
    order = read_order(scene.exchange, "w00")
    assert order is not None
    box.forget(order["taken"])
    assert (scene.dealt("w00"), box.groups) == ([3], [])
    commit(box, 3)
    scene.round()
    assert items(scene, 1) == [3]


def test_a_trainer_that_resumes_removes_what_it_finds_settled(tmp_path: Path) -> None:
    box = two_finished(Scene(tmp_path))
    again = Scene(tmp_path, token="t2")
    again.round()
    again.dealer.settle_before(2)
    assert [group_path(box.folder, number).is_file() for number in (0, 1)] == [False, True]


def test_boxes_that_are_no_longer_read_are_removed_unless_a_group_is_needed(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    boxes = [scene.start("w00")]
    scene.dealer.want(0, [1])
    scene.round()
    commit(boxes[0], 1)
    scene.round()
    boxes += [scene.start("w00", attempt) for attempt in range(2, 8)]
    others = [scene.workers / "w00" / name for name in ("box-9-unannounced", "box-of-mine", "notes")]
    for other in others:
        other.mkdir()
    scene.round()
    scene.dealer.settle_before(1)
    there = [box.folder.is_dir() for box in boxes]
    assert there == [True, False, False, True, True, True, True]  # item 1 is finished in the first
    scene.dealer.settle_before(2)
    assert not boxes[0].folder.exists()
    assert all(other.is_dir() for other in others)
