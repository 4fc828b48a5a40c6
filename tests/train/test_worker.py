"""Rollout workers and a trainer's loop as processes of one machine, killed at seeded moments.

Versions, orders, boxes and group files are real. A light sampler stands for the model, so that a round takes
milliseconds; test_worker_runs.py has a model.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1hpc.base.errors import StateError
from r1hpc.base.files import write_json
from r1hpc.train.exchange.dealer import Dealer
from r1hpc.train.exchange.mailbox import Box, read_beat, read_boxes
from r1hpc.train.exchange.versions import digest_of, prune, publish
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rollout.groups import Groups, read_groups
from r1hpc.train.rollout.worker import REPLACED, TRAINED, Worker
from tests.train.test_groups import groups

fork = multiprocessing.get_context("fork")
ROUND_S, SILENCE_S = 0.01, 0.4
NUM_ITEMS, STALENESS, IN_FLIGHT = 6, 2, 3
WORKERS = ["w00", "w01"]


class LightSampler:
    """Makes groups whose tokens are the item and the value of the weights, after some milliseconds."""

    def __init__(self, seed: int, *, wrong: bool = False) -> None:
        self._random, self._wrong = random.Random(seed), wrong
        self._value = -1

    def load(self, weights: dict[str, torch.Tensor]) -> str:
        if self._wrong:
            weights["value"] += 1
        self._value = int(weights["value"])
        return digest_of(weights.items())

    def groups(self, indices: list[int], version: int, should_stop: Callable[[], bool]) -> Groups | None:
        until = time.monotonic() + self._random.uniform(0.002, 0.02)
        while time.monotonic() < until:
            if should_stop():
                return None
            time.sleep(0.001)
        one = groups(0, 3)
        tokens = np.full_like(one.tokens, self._value)
        versions = np.full_like(one.versions, version)
        group = replace(one, tokens=tokens, versions=versions).select([0])
        parts = [replace(group, items=np.array([item]), prompts=((item,),)) for item in indices]
        return Groups.joined(parts)


def work(run: Path, worker: str, attempt: int, wrong: bool = False) -> None:
    """One start of a worker."""
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    stop: list[bool] = []
    box = Box.opened(run / "workers" / worker, attempt, f"a{attempt}")
    sampler = LightSampler(attempt, wrong=wrong)
    started = Worker(
        run / "exchange",
        box,
        sampler.load,
        sampler.groups,
        at_once=2,
        should_stop=lambda: bool(stop),
        is_over=(run / "trained/over.json").exists,
        round_s=ROUND_S,
    )
    with suppress(TrainError):
        started.run()


def record_path(run: Path, rollout: int) -> Path:
    return run / "trained" / f"{rollout:06d}.json"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "trained").glob("[0-9]*.json"))]


def items_of(rollout: int) -> range:
    return range(rollout * NUM_ITEMS, (rollout + 1) * NUM_ITEMS)


def train(run: Path, num_rollouts: int, token: str) -> None:
    """The trainer's loop: publish, deal, record, update. An update adds the sum of the tokens' values."""
    before = records(run)
    first = len(before)
    values = [1, *(record["value_after"] for record in before)]
    dealer = Dealer(
        run / "exchange",
        run / "workers",
        token,
        max_staleness=STALENESS,
        in_flight=IN_FLIGHT,
        silence_s=SILENCE_S,
    )
    dealer.settle_before(items_of(first)[0])
    for rollout in range(first, min(first + STALENESS, num_rollouts)):
        dealer.want(rollout, items_of(rollout))
    for rollout in range(first, num_rollouts):
        if rollout + STALENESS < num_rollouts:
            dealer.want(rollout + STALENESS, items_of(rollout + STALENESS))
        weights = {"value": torch.tensor(values[rollout]), "pad": torch.zeros(9)}
        latest = publish(run / "exchange", rollout, weights.items(), token)
        prune(run / "exchange", latest, STALENESS + 2)
        dropped = dealer.round(latest, time.monotonic())
        taken = dict[int, tuple[str, Groups]]()
        while len(taken) < NUM_ITEMS:
            for finished in dealer.finished(rollout):
                try:
                    taken[finished.item] = read_groups(finished.path, finished.sha256)
                except StateError:
                    dropped.append(dealer.reject(finished.item, "damaged"))
            time.sleep(ROUND_S)
            dropped += dealer.round(latest, time.monotonic())
        lines = []
        for finished in dealer.finished(rollout):
            policy, group = taken[finished.item]
            inside = np.arange(group.tokens.shape[1])[None, :] < group.lengths[:, None]
            [version] = {int(version) for version in group.versions[inside]}
            assert set(group.tokens[inside].tolist()) == {values[version]}, "sampled with other weights"
            lines.append([int(group.items[0]), version, finished.worker, policy])
        value = values[rollout] + sum(group.oldest + 1 for group in dealer.finished(rollout))
        reasons = [one.dropped.split(":")[0].split(" by ")[0] for one in dropped]
        write_json(
            record_path(run, rollout),
            {"groups": lines, "value_after": value, "dropped": reasons, "token": token},
        )
        values.append(value)
        dealer.settle_before(items_of(rollout + 1)[0])
    write_json(run / "trained" / "over.json", {})


class Scene:
    """The processes, and what is done to them."""

    def __init__(self, run: Path, num_rollouts: int, seed: int) -> None:
        self.run, self.num_rollouts = run, num_rollouts
        self.random = random.Random(seed)
        self.num_starts = 0
        self.all: list[BaseProcess] = []
        (run / "trained").mkdir()
        self.workers = {name: self.start_worker(name) for name in WORKERS}
        self.trainer = self.start_trainer()

    def start(self, target: Callable[..., None], *arguments: Any) -> BaseProcess:
        process = fork.Process(target=target, args=arguments, daemon=True)
        process.start()
        self.all.append(process)
        return process

    def start_worker(self, name: str, wrong: bool = False) -> BaseProcess:
        self.num_starts += 1
        return self.start(work, self.run, name, self.num_starts, wrong)

    def start_trainer(self) -> BaseProcess:
        self.num_starts += 1
        return self.start(train, self.run, self.num_rollouts, f"t{self.num_starts}")

    def is_over(self) -> bool:
        return (self.run / "trained/over.json").exists()

    def disturb(self) -> str:
        name = self.random.choice(WORKERS)
        kinds = ["kill", "term", "stop", "torn", "two", "wrong", "trainer"]
        kind = self.random.choices(kinds, [8, 3, 2, 2, 2, 1, 2])[0]
        worker = self.workers[name]
        if kind == "trainer":
            self.trainer.kill()
            self.trainer.join(30)
            self.trainer = self.start_trainer()
        elif kind == "torn":
            self.tear(name)
        elif kind == "stop" and worker.pid:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGSTOP)
            self.pause(1.5 * SILENCE_S)
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)
        else:
            if kind == "term":
                worker.terminate()
            elif kind != "two":  # two: both starts are there for a while
                worker.kill()
                worker.join(30)
            self.workers[name] = self.start_worker(name, wrong=kind == "wrong")
        return kind

    def tear(self, name: str) -> None:
        """Cut the newest group file of a worker, before or after the dealer has seen it."""
        for box in read_boxes(self.run / "workers" / name)[-1:]:
            beat = read_beat(box)
            number = beat["committed"] if beat else 0
            deadline = time.monotonic() + 0.2
            while time.monotonic() < deadline:
                with suppress(FileNotFoundError):
                    os.truncate(box / f"g-{number:06d}.npz", 100)
                    return
                time.sleep(0.0005)

    def pause(self, seconds: float) -> None:
        """Wait, and start again what has left."""
        time.sleep(seconds)
        for name, worker in self.workers.items():
            if not worker.is_alive() and not self.is_over():
                self.workers[name] = self.start_worker(name)
        # A trainer that read a torn file of a group that counted ends; a resume begins after the record.
        if not self.trainer.is_alive() and not self.is_over():
            self.trainer = self.start_trainer()

    def end(self) -> None:
        for process in self.all:
            process.kill()
            process.join(30)


def check_records(run: Path, num_rollouts: int) -> None:
    """Each item of each rollout is there once, sampled by weights that were not too old."""
    lines = records(run)
    assert len(lines) == num_rollouts
    for rollout, record in enumerate(lines):
        assert [line[0] for line in record["groups"]] == list(items_of(rollout))
        for _, version, *_ in record["groups"]:
            assert 0 <= rollout - version <= STALENESS


def run_disturbed(run: Path, num_rollouts: int, seed: int, most: int, limit_s: float) -> dict[str, int]:
    """Disturb until the trainer is over, at most `most` times; return how often each kind was done."""
    scene, counts = Scene(run, num_rollouts, seed), dict[str, int]()
    deadline = time.monotonic() + limit_s
    try:
        while not scene.is_over():
            assert time.monotonic() < deadline, f"{len(records(run))} rollouts, {counts}"
            scene.pause(scene.random.uniform(0.01, 0.1))
            if sum(counts.values()) < most and not scene.is_over():
                kind = scene.disturb()
                counts[kind] = counts.get(kind, 0) + 1
    finally:
        scene.end()
    return counts


def test_undisturbed_workers_leave_when_the_trainer_is_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 8, seed=0)
    try:
        for process in [scene.trainer, *scene.workers.values()]:
            process.join(30)
            assert process.exitcode == 0
    finally:
        scene.end()
    check_records(tmp_path, 8)
    lines = records(tmp_path)
    assert {line[2] for record in lines for line in record["groups"]} == set(WORKERS)
    assert [reason for record in lines for reason in record["dropped"]] == []
    left = [read_beat(box) for name in WORKERS for box in read_boxes(tmp_path / "workers" / name)]
    assert [beat["left"] for beat in left if beat] == [TRAINED, TRAINED]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_item_counts_once_whatever_is_killed(tmp_path: Path, seed: int) -> None:
    counts = run_disturbed(tmp_path, 12, seed, most=15, limit_s=50)
    assert sum(counts.values()) > 3, counts
    check_records(tmp_path, 12)


def lone(run: Path, sampler: LightSampler, should_stop: Callable[[], bool] = lambda: False) -> Worker:
    box = Box.opened(run / "workers/w00", 1, "a1")
    return Worker(
        run / "exchange",
        box,
        sampler.load,
        sampler.groups,
        at_once=2,
        should_stop=should_stop,
        is_over=lambda: False,
        idle_s=0.05,
        round_s=ROUND_S,
    )


def test_a_worker_with_other_weights_than_announced_refuses_to_sample(tmp_path: Path) -> None:
    publish(tmp_path / "exchange", 0, [("value", torch.tensor(1))], "t1")
    with pytest.raises(TrainError, match="other weights than version 0"):
        lone(tmp_path, LightSampler(0, wrong=True)).run()


def test_a_worker_without_an_order_leaves(tmp_path: Path) -> None:
    assert lone(tmp_path, LightSampler(0)).run() == "no order came for 0.05 s"


def test_an_older_start_leaves_for_a_newer_one(tmp_path: Path) -> None:
    worker = lone(tmp_path, LightSampler(0))
    Box.opened(tmp_path / "workers/w00", 2, "a2")
    assert worker.run() == REPLACED


def test_a_worker_does_not_sample_for_a_trainer_that_was_replaced(tmp_path: Path) -> None:
    """The order of an attempt whose token is not latest.json's is void, and one for another start too."""
    exchange, workers = tmp_path / "exchange", tmp_path / "workers"
    worker = lone(tmp_path, LightSampler(0))
    latest = publish(exchange, 0, [("value", torch.tensor(1))], "t1")
    dealer = Dealer(exchange, workers, "t1", max_staleness=0, in_flight=2)
    dealer.want(0, [1, 2])
    dealer.round(latest, 0.0)
    worker._load(latest)
    dealer.round(latest, 1.0)
    publish(exchange, 0, [("value", torch.tensor(1))], "t2")
    assert worker.run() == "no order came for 0.05 s"
    beat = read_beat(read_boxes(workers / "w00")[0])
    assert beat is not None
    assert beat["groups"] == []


def test_a_stop_leaves_with_what_is_committed_and_says_so(tmp_path: Path) -> None:
    polls: list[bool] = []

    def should_stop() -> bool:
        polls.append(True)
        return len(polls) > 3

    worker = lone(tmp_path, LightSampler(0), should_stop)
    worker.idle_s = math.inf  # also on a busy machine
    worker.run()
    beat = read_beat(read_boxes(tmp_path / "workers/w00")[0])
    assert beat is not None
    assert beat["left"] == "stopped"


if __name__ == "__main__":  # python -m tests.train.test_worker RUN SEED ROLLOUTS MOST: a longer storm
    import sys

    where, chosen_seed, rollouts, number = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    where.mkdir()
    print(run_disturbed(where, rollouts, chosen_seed, number, limit_s=600))
    check_records(where, rollouts)
    print(sorted({reason for record in records(where) for reason in record["dropped"]}))
