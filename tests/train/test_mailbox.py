"""Boxes and orders in files: what is announced is there, at whatever moment the writer is killed."""

import hashlib
import multiprocessing
import random
import time
from itertools import count
from pathlib import Path

from r1hpc.train.exchange.mailbox import (
    Box,
    Order,
    group_path,
    read_beat,
    read_boxes,
    read_order,
    write_order,
)

fork = multiprocessing.get_context("fork")


def write_item(path: Path, item: int) -> str:
    raw = str(item).encode() * 100
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def commit(box: Box, item: int, version: int = 0) -> None:
    box.commit(item, (version, version), lambda path: write_item(path, item))


def test_a_committed_group_is_announced_with_its_bytes(tmp_path: Path) -> None:
    box = Box.opened(tmp_path, 1, "a")
    commit(box, 17, version=3)
    assert read_boxes(tmp_path) == [box.folder]
    beat = read_beat(box.folder)
    assert beat is not None
    [group] = beat["groups"]
    assert (group["item"], group["oldest"], group["newest"]) == (17, 3, 3)
    raw = group_path(box.folder, group["number"]).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == group["sha256"]


def test_a_newer_start_is_the_current_one_and_four_are_read(tmp_path: Path) -> None:
    boxes = [Box.opened(tmp_path, attempt, "a") for attempt in range(1, 7)]
    assert read_boxes(tmp_path) == [box.folder for box in boxes[2:]]
    assert [box.is_current() for box in boxes] == [False] * 5 + [True]


def test_groups_that_are_taken_leave_the_box(tmp_path: Path) -> None:
    box = Box.opened(tmp_path, 1, "a")
    for item in (5, 6, 7):
        commit(box, item)
    box.forget(2)
    beat = read_beat(box.folder)
    assert beat is not None
    assert [group["item"] for group in beat["groups"]] == [7]
    assert [path.name for path in box.folder.glob("g-*")] == ["g-000002.npz"]


def test_what_cannot_be_read_is_asked_for_again(tmp_path: Path) -> None:
    order = Order(token="t", box="box-1-a", max_staleness=1, deals=[], taken=0)
    assert read_order(tmp_path, "w00") is None
    write_order(tmp_path, "w00", order)
    assert read_order(tmp_path, "w00") == order
    for damaged in ("", '{"token": "t"', '{"token": 1}', "[" * 9999):
        (tmp_path / "orders/w00.json").write_text(damaged)
        assert read_order(tmp_path, "w00") is None
    assert read_boxes(tmp_path / "w01") == []
    assert read_beat(tmp_path) is None


def commit_for_ever(worker_dir: Path, attempt: int) -> None:
    box = Box.opened(worker_dir, attempt, "a")
    for item in count():
        commit(box, item)
        box.forget(item - 5)


def test_a_kill_at_any_moment_leaves_no_announced_name_without_its_file(tmp_path: Path) -> None:
    rng, seen = random.Random(0), 0
    for attempt in range(1, 401):
        if attempt > 40 and seen > 100:  # a busy machine needs more
            break
        child = fork.Process(target=commit_for_ever, args=(tmp_path, attempt))
        child.start()
        time.sleep(rng.uniform(0.002, 0.03))
        child.kill()
        child.join(30)
        for folder in read_boxes(tmp_path):
            beat = read_beat(folder)
            assert beat is not None
            for group in beat["groups"]:
                raw = group_path(folder, group["number"]).read_bytes()
                assert hashlib.sha256(raw).hexdigest() == group["sha256"]
                seen += 1
    assert seen > 100
