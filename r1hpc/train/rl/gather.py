"""Collect rollouts from rollout workers, and sample the groups that nobody brings.

Rank 0 publishes a version of the policy before each rollout is trained on, and a thread of it deals the items
of this rollout and of the next rl.max_staleness ones (exchange/dealer.py). A rollout that an earlier attempt
recorded is trained on as it was, and nobody is asked.
"""

import threading
import time
from dataclasses import replace
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.checkpoint.fence import has_begun, incarnation_dir
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.train.exchange.dealer import Dealer, Finished
from r1hpc.train.exchange.versions import Latest, prune, publish
from r1hpc.train.loop.session import Job, Session
from r1hpc.train.loop.step import agree
from r1hpc.train.rl.collect import Collector
from r1hpc.train.rl.record import read_record, write_record
from r1hpc.train.rl.rollout import Rollout
from r1hpc.train.rollout.groups import Groups, read_groups
from r1hpc.train.rollout.judge import Judge
from r1hpc.train.rollout.weight_sync import served_weights

_ROUND_S = 0.5


class Gatherer(Collector):
    """A collector that samples only what no worker brings."""

    def __init__(self, job: Job, judge: Judge, policy: Any) -> None:
        super().__init__(job, judge, policy)
        self.ahead = 0  # the workers are
        config = job.config
        self._num_prompts, self._staleness = config.rollout.num_prompts, config.rl.max_staleness
        self._last = (config.train.num_steps - 1) // updates_per_rollout(config)
        self._own = incarnation_dir(job.run.checkpoints, job.attempt, job.token)
        self._dealer = Dealer(
            job.run.exchange,
            job.run.workers,
            job.token,
            max_staleness=self._staleness,
            in_flight=2 * (config.rollout.prompts_per_batch or self._num_prompts),
            silence_s=config.workers.silence_s,
            came_at=time.monotonic(),
        )
        self._lock = threading.Lock()
        """Around the dealer, and what follows."""
        self._latest: Latest | None = None
        self._next_wanted = 0
        self._dropped: list[Finished] = []
        self._failure: Exception | None = None
        self._workers: dict[int, str] | None = None
        """The worker of each item that came, in the current rollout. None: the rollout was recorded."""
        if job.group.rank == 0:
            threading.Thread(target=self._deal, name="dealer", daemon=True).start()

    def collect(self, session: Session, rollout_index: int, first_item: int, version: int) -> Rollout | None:
        index, group = rollout_index, self._job.group
        self._publish(index)
        recorded: Rollout | None = group.broadcast(self._ask(index, first_item) if group.rank == 0 else None)
        if recorded is not None:
            self._workers = None
            return recorded
        self._workers, self._given, began = {}, {}, time.monotonic()
        while True:
            if group.rank == 0:
                self._take(index)
            is_enough = len(self._given) == self._num_prompts or self._is_over(began)
            agreed = agree(session, sums=[float(is_enough and group.rank == 0)])
            if agreed.stop:
                return None
            if agreed.sums[0]:
                break
            self._job.watchdog.beat("waiting for rollout workers")
            time.sleep(_ROUND_S)
        facts = {"worker_groups": len(self._given), "workers_wait_s": time.monotonic() - began}
        if group.rank == 0 and len(self._given) < self._num_prompts:
            missing = set(range(first_item, first_item + self._num_prompts)) - self._given.keys()
            print(f"rollout {index}: {len(missing)} groups did not come, and are sampled here", flush=True)
            with self._lock:
                self._dealer.give_up(missing)
        rollout = super().collect(session, index, first_item, version)
        return rollout and replace(rollout, engine_facts={**rollout.engine_facts, **facts})

    def record(self, rollout: Rollout, first_item: int) -> None:
        """Write a rollout's record, unless it came from there; its groups may leave their boxes then."""
        items = range(first_item, first_item + rollout.num_items)
        with self._lock:
            dropped, self._dropped = self._dropped, []
        if self._workers is not None:
            rejected = [[one.item, one.worker, one.dropped] for one in dropped]
            groups = [[item, self._workers.get(item, "")] for item in items]
            facts = {"groups": groups, "dropped": rejected, "weights": rollout.policy_id}
            write_record(self._job.run, rollout, first_item, facts)
        with self._lock:
            self._dealer.settle_before(items.stop)

    def _publish(self, index: int) -> None:
        """Publish the weights as version `index`. Collective under ZeRO 3."""
        self._job.watchdog.beat(f"publishing version {index}")
        weights = served_weights(self._policy)
        if self._job.group.rank != 0:
            for _ in weights:
                pass
            return
        if not has_begun(self._own):
            raise StateError("a newer attempt of this run has taken over: this one publishes nothing")
        latest = publish(self._job.run.exchange, index, weights, self._job.token)
        with self._lock:
            self._latest = latest
            prune(self._job.run.exchange, latest, self._staleness + 2)

    def _ask(self, index: int, first_item: int) -> Rollout | None:
        """Have the items dealt of this rollout and of those that may be sampled already; return its record,
        if there is one."""
        recorded = self._recorded(index, first_item)
        with self._lock:
            self._dealer.settle_before(first_item + (self._num_prompts if recorded else 0))
            for rollout in range(max(index, self._next_wanted), min(index + self._staleness, self._last) + 1):
                first = first_item + (rollout - index) * self._num_prompts
                if self._recorded(rollout, first) is None:
                    self._dealer.want(rollout, range(first, first + self._num_prompts))
                self._next_wanted = rollout + 1
        return recorded

    def _recorded(self, index: int, first_item: int) -> Rollout | None:
        if not self._job.run.record(index).exists():
            return None
        try:
            return read_record(self._job.run, index, first_item)
        except StateError as error:
            print(f"rollout {index} is sampled again: {error}", flush=True)
            return None

    def _take(self, index: int) -> None:
        """Read the groups that came. One that cannot be trained on is dropped, and its item dealt again."""
        assert self._workers is not None
        with self._lock:
            if self._failure is not None:
                raise self._failure
            finished = [one for one in self._dealer.finished(index) if one.item not in self._given]
        for one in finished:
            try:
                self._given[one.item] = self._read(one)
                self._workers[one.item] = one.worker
            except StateError as error:
                with self._lock:
                    self._drop([self._dealer.reject(one.item, str(error))])

    def _read(self, finished: Finished) -> Groups:
        _, groups = read_groups(finished.path, finished.sha256)
        size = self._job.config.rollout.num_generations
        if groups.items.tolist() != [finished.item] or groups.num_members != size or not groups.prompts:
            raise StateError(f"{finished.path} holds another item, or another number of completions")
        return groups

    def _is_over(self, began: float) -> bool:
        """True if no group has come for workers.patience_s; a worker that is there gets so long each time."""
        with self._lock:
            since = max(self._dealer.came_at, began if self._dealer.num_there else 0.0)
        return time.monotonic() - since > (self._job.config.workers.patience_s or 0.0)

    def _deal(self) -> None:
        """Deal until this attempt ends, or another takes over."""
        while has_begun(self._own):
            try:
                with self._lock:
                    if self._latest is not None:
                        self._drop(self._dealer.round(self._latest, time.monotonic()))
            except Exception as error:  # the next rollout raises it
                self._failure = error
                return
            time.sleep(_ROUND_S)

    def _drop(self, dropped: list[Finished]) -> None:
        self._dropped += dropped
        for one in dropped:
            if not one.is_twin:
                print(f"a group of item {one.item} by {one.worker} is dropped: {one.dropped}", flush=True)
