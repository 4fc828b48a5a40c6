"""Sample what a trainer deals: the stage `rollout`. It is a run of its own on one GPU, whose box is in
<trainer's run>/workers/<name of this run>.

    load the newest version and prove it → sample items of the order → commit each group → again

Weights change between two batches only, when no completion is under way. A group that is not committed when
this process ends is lost, and dealt to another worker.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from r1hpc.attempt.workload import Outcome
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import read_object
from r1hpc.base.run_dir import RunDir
from r1hpc.train.exchange.mailbox import Box, Deal, Order, read_order
from r1hpc.train.exchange.versions import Latest, digest_of, load_version, read_latest
from r1hpc.train.loop.session import Job
from r1hpc.train.model.model import build_model
from r1hpc.train.parallel.engine import check_precision
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rollout.groups import Groups, write_groups
from r1hpc.train.rollout.judge import ShouldStop, open_judge
from r1hpc.train.rollout.policy import placement
from r1hpc.train.rollout.weight_sync import served_weights

TRAINED, REPLACED = "the trainer has finished", "a newer start of this worker"


@dataclass
class Worker:
    """One start of a rollout worker."""

    exchange: Path
    box: Box
    load: Callable[[dict[str, torch.Tensor]], str]
    """Takes weights; returns the digest of those that the network has then."""
    groups: Callable[[list[int], int, ShouldStop], Groups | None]
    """Returns the scored groups of items, sampled with the weights of this version; None at a stop."""
    at_once: int
    """Items that are sampled together."""
    should_stop: ShouldStop
    is_over: Callable[[], bool]
    """True once the trainer has finished."""
    idle_s: float = 600.0
    """Without a deal for so long it leaves."""
    round_s: float = 1.0
    _sampled: set[tuple[str, int]] = field(default_factory=set)
    """(token of the order, number of the deal): sampled already."""
    _beaten_at: float = -math.inf

    def run(self) -> str:
        """Sample until there is a reason to leave, and return it; empty if a stop was requested."""
        name, idle_since = self.box.folder.parent.name, time.monotonic()
        while not self._stop_requested():
            if not self.box.is_current():
                return self._leave(REPLACED)
            latest, order = read_latest(self.exchange), read_order(self.exchange, name)
            self._load(latest)
            # Of the attempt that published last, and for this start.
            address = (latest["token"], self.box.folder.name) if latest else None
            if order is not None and (order["token"], order["box"]) == address:
                self.box.forget(order["taken"])
                if deals := self._to_do(order):
                    self._sample(order["token"], deals)
                    idle_since = time.monotonic()
                    continue
            if self.is_over():
                return self._leave(TRAINED)
            if time.monotonic() - idle_since > self.idle_s:
                return self._leave(f"no order came for {self.idle_s:g} s")
            time.sleep(self.round_s)
        return self._leave("")

    def _load(self, latest: Latest | None) -> None:
        """Load a version that was announced since. One that cannot be read now is tried again later."""
        box = self.box
        if latest is None or (latest["version"], latest["digest"]) == (box.version, box.digest):
            return
        try:
            weights = load_version(self.exchange, latest)
        except StateError as error:
            print(f"version {latest['version']} is not loaded yet: {error}", flush=True)
            return
        digest = self.load(weights)
        if digest != latest["digest"]:
            raise TrainError(
                f"the network has other weights than version {latest['version']} after loading it: "
                f"{digest[:12]}, not {latest['digest'][:12]}. Start this worker on another node"
            )
        box.version, box.digest = latest["version"], digest
        box.beat()

    def _to_do(self, order: Order) -> list[Deal]:
        """Return the next deals. Weights that came after the order may be newer than a deal's rollout."""
        token, most = order["token"], order["max_staleness"]
        left = [deal for deal in order["deals"] if (token, deal["number"]) not in self._sampled]
        fresh = [deal for deal in left if 0 <= deal["rollout"] - self.box.version <= most]
        return fresh[: self.at_once]

    def _sample(self, token: str, deals: list[Deal]) -> None:
        """Sample and commit, unless a stop is requested before the groups are there."""
        version, digest = self.box.version, self.box.digest
        groups = self.groups([deal["item"] for deal in deals], version, self._stop_requested)
        if groups is None:
            return
        for at, deal in enumerate(deals):
            write = partial(write_groups, groups=groups.select([at]), policy_id=digest)
            self.box.commit(deal["item"], (version, version), write)
            self._sampled.add((token, deal["number"]))

    def _stop_requested(self) -> bool:
        """True if this worker was asked to stop. Also beats, at most once a round."""
        if time.monotonic() - self._beaten_at > self.round_s:
            self._beaten_at = time.monotonic()
            self.box.beat()
        return self.should_stop()

    def _leave(self, reason: str) -> str:
        self.box.left = reason or "stopped"
        self.box.beat()
        return reason


def refuse_other_prompts(trainer: RunDir, form: str) -> None:
    """Raise UsageError if the trainer makes other tokens of a prompt; `form` is this worker's asking id."""
    theirs = read_object(trainer.metrics / "evaluated.json", dict[str, Any]).get("form", form)
    if theirs != form:
        raise UsageError(
            f"tokenizer, chat template or end tokens (id {form}) are not those of {trainer.path} (id "
            f"{theirs}): put the files of its model back as they were when it began"
        )


def run(job: Job) -> Outcome:
    """Sample for the trainer of workers.trainer until its run has finished."""
    config = job.config
    check_precision(config.train)
    trainer = RunDir(config.workers.trainer or "")
    box = Box.opened(trainer.workers / job.run.run_id, job.attempt, job.token)

    def should_stop() -> bool:
        job.watchdog.beat("sampling for the trainer")
        return job.requests.poll()[0]

    with open_judge(job, zero_stage=0) as (judge, hf_config):
        place = placement(config, job.group, divided=False)
        network = build_model(config.model, hf_config, config.train.seed, place).eval()

        def load(weights: dict[str, torch.Tensor]) -> str:
            refuse_other_prompts(trainer, judge.asking_id)
            network.load_state_dict(weights)
            judge.engine.sync_weights(network)
            return digest_of(served_weights(network))

        reason = Worker(
            trainer.exchange,
            box,
            load,
            judge.groups,
            at_once=config.rollout.prompts_per_batch or config.rollout.num_prompts,
            should_stop=should_stop,
            is_over=trainer.finished.exists,
            idle_s=60 * config.workers.idle_minutes,
        ).run()
    return Outcome(reason not in ("", REPLACED), None, None, reason or job.stop_reason(), box.committed)
