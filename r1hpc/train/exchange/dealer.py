"""Decide which worker samples which item, and which of the finished groups count.

    dealer = Dealer(exchange, workers_dir, token, max_staleness=2, in_flight=8)
    dealer.want(7, items)                                # rollout 7 will train on these
    dropped = dealer.round(latest, time.monotonic())     # about once a second
    groups = dealer.finished(7); ...; dealer.settle_before(next_item)

An item is free, dealt to a start of a worker, then finished; settled once its rollout is on record. It is
free again where its worker is silent, has left or has another start, or where its group is rejected. The
first group of an item counts; a later one is a twin. The worker of an item must hold weights that are at most
`max_staleness` behind the item's rollout when it is dealt, so no finished group is too old. Everything but
what is wanted and settled is in the files: a new dealer, after a restart of the trainer, finds there what was
finished. A worker is found by listing `workers_dir`, which NFS may show a minute late.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from r1hpc.train.exchange import mailbox
from r1hpc.train.exchange.mailbox import Beat, Deal, Group, Order, group_path
from r1hpc.train.exchange.versions import Latest

_MOST_REJECTED = 3
"""Rejected groups of one start, after which it is dealt nothing more."""


@dataclass(frozen=True)
class Finished:
    """A finished group, and why it was dropped if it does not count."""

    item: int
    path: Path
    sha256: str
    oldest: int
    newest: int
    worker: str
    dropped: str = ""
    is_twin: bool = False


@dataclass
class _Box:
    """A start of a worker, as the dealer has seen it."""

    folder: Path
    beat: Beat | None = None
    changed_at: float = -math.inf
    """When its count was seen to change; never, for a box left by a start that is gone."""
    judged: set[int] = field(default_factory=set)
    """Numbers of groups that were found finished or were dropped."""
    num_rejected: int = 0


@dataclass
class _Worker:
    name: str
    boxes: dict[str, _Box] = field(default_factory=dict)
    """By name, the current one last."""
    deals: dict[int, Deal] = field(default_factory=dict)
    """By item: what its current start is to sample."""
    order: Order | None = None

    @property
    def box(self) -> _Box | None:
        return next(reversed(self.boxes.values()), None)


class Dealer:
    """Deals the items of the coming rollouts to the workers. Only one thread may use it."""

    def __init__(
        self,
        exchange: Path,
        workers_dir: Path,
        token: str,
        *,
        max_staleness: int,
        in_flight: int,
        silence_s: float = 30.0,
    ) -> None:
        """`token` is of the trainer's attempt, `in_flight` the most groups that a worker holds at once."""
        self._exchange, self._workers_dir, self._token = exchange, workers_dir, token
        self._max_staleness, self._in_flight, self._silence_s = max_staleness, in_flight, silence_s
        self._workers: dict[str, _Worker] = {}
        self._wanted: dict[int, int] = {}
        """Item to rollout, in the order of dealing."""
        self._finished: dict[int, Finished] = {}
        self._settled_before = 0
        self._digests: dict[int, str] = {}
        self._next_deal = 0
        self._dropped: list[Finished] = []
        self.num_there = 0
        """Workers that were heard, at the last round."""
        self.has_news = False
        """True if a group came in the last round."""

    def want(self, rollout: int, items: Sequence[int]) -> None:
        """Ask for a group of each item, for this rollout, after everything that was asked for before."""
        assert not self._wanted.keys() & set(items), "an item is wanted once"
        self._wanted |= dict.fromkeys(items, rollout)

    def settle_before(self, item: int) -> None:
        """Forget the items below `item`, which are on record: other groups of them are twins."""
        self._settled_before = item
        self.give_up([one for one in self._wanted if one < item])

    def give_up(self, items: Iterable[int]) -> None:
        """Want these items no longer."""
        for item in items:
            self._wanted.pop(item, None)
            self._finished.pop(item, None)
            self._free(item)

    def reject(self, item: int, reason: str) -> Finished:
        """Drop a finished group that cannot be used, for `reason`; its item is dealt again."""
        finished = self._finished.pop(item)
        for box in self._workers[finished.worker].boxes.values():
            box.num_rejected += box.folder == finished.path.parent
        return replace(finished, dropped=reason)

    def finished(self, rollout: int) -> list[Finished]:
        """Return the groups that are there for a rollout, in the order in which they were wanted."""
        items = [item for item, its_rollout in self._wanted.items() if its_rollout == rollout]
        return [self._finished[item] for item in items if item in self._finished]

    def round(self, latest: Latest, now: float) -> list[Finished]:
        """Read what the workers announce, deal what is free, and return the groups dropped in this round.

        `latest` is the newest version, `now` the time of a monotonic clock.
        """
        self._digests[latest["version"]] = latest["digest"]
        self._dropped, num_finished = [], len(self._finished)
        names = sorted(path.name for path in self._workers_dir.glob("*"))
        self._workers |= {name: _Worker(name) for name in names if name not in self._workers}
        for worker in self._workers.values():
            self._read(worker, now)
        there = [worker for worker in self._workers.values() if self._is_there(worker, now)]
        for worker in self._workers.values():
            if worker not in there:
                worker.deals.clear()
        self._deal([worker for worker in there if self._is_proven(worker)])
        for worker in self._workers.values():
            self._write_order(worker)
        self.num_there, self.has_news = len(there), len(self._finished) > num_finished
        return self._dropped

    def versions_in_use(self) -> set[int]:
        """Return the versions that workers hold."""
        return {
            worker.box.beat["version"] for worker in self._workers.values() if worker.box and worker.box.beat
        }

    def _read(self, worker: _Worker, now: float) -> None:
        folders = mailbox.read_boxes(self._workers_dir / worker.name)
        if folders:  # else it has not begun, or cannot be read in this round
            # A new start has not been heard in this round, so it keeps no deals of the one before.
            worker.boxes = {path.name: worker.boxes.get(path.name, _Box(path)) for path in folders}
        for box in worker.boxes.values():
            beat = mailbox.read_beat(box.folder)
            if beat is None:
                continue
            if box.beat is not None and beat["count"] != box.beat["count"]:
                box.changed_at = now
            box.beat = beat
            for group in beat["groups"]:
                if group["number"] not in box.judged:
                    self._judge(worker, box, group)

    def _judge(self, worker: _Worker, box: _Box, group: Group) -> None:
        """Decide on a group that was announced. It stays undecided while nobody wants it."""
        item, number = group["item"], group["number"]
        rollout = self._wanted.get(item)
        if rollout is None and item >= self._settled_before:
            return
        box.judged.add(number)
        path, oldest, newest = group_path(box.folder, number), group["oldest"], group["newest"]
        finished = Finished(item, path, group["sha256"], oldest, newest, worker.name)
        # Of an earlier start: the current one may be sampling the item.
        if box is worker.box:
            worker.deals.pop(item, None)
        if rollout is None or item in self._finished:
            reason = "another group of this item was first"
            self._dropped.append(replace(finished, dropped=reason, is_twin=True))
        elif not rollout - self._max_staleness <= oldest <= newest <= rollout:
            first = rollout - self._max_staleness
            reason = (
                f"sampled by versions {oldest} to {newest}, and rollout {rollout} takes {first} to {rollout}"
            )
            self._dropped.append(replace(finished, dropped=reason))
        else:
            self._finished[item] = finished
            self._free(item)

    def _free(self, item: int) -> None:
        for worker in self._workers.values():
            worker.deals.pop(item, None)

    def _is_there(self, worker: _Worker, now: float) -> bool:
        """True if a worker's start is heard, has not left, and does not write damaged files."""
        box = worker.box
        if box is None or box.beat is None or box.beat["left"] or box.num_rejected >= _MOST_REJECTED:
            return False
        return now - box.changed_at <= self._silence_s

    def _is_proven(self, worker: _Worker) -> bool:
        """True if a worker's network has the very weights of the version that it names."""
        beat = _beat_of(worker)
        return self._digests.get(beat["version"]) == beat["digest"]

    def _deal(self, able: Sequence[_Worker]) -> None:
        """Deal free items in their order, each to the worker with the fewest that may have it."""
        dealt = {item for worker in self._workers.values() for item in worker.deals}
        for item, rollout in self._wanted.items():
            if item in dealt or item in self._finished:
                continue
            fitting = [worker for worker in able if self._may_have(worker, rollout)]
            if fitting:
                worker = min(fitting, key=lambda one: len(one.deals))
                worker.deals[item] = Deal(number=self._next_deal, item=item, rollout=rollout)
                self._next_deal += 1

    def _may_have(self, worker: _Worker, rollout: int) -> bool:
        behind = rollout - _beat_of(worker)["version"]
        return len(worker.deals) < self._in_flight and 0 <= behind <= self._max_staleness

    def _write_order(self, worker: _Worker) -> None:
        box = worker.box
        if box is None:
            return
        unsettled = {item.path for item in self._finished.values()}
        order = Order(
            token=self._token,
            box=box.folder.name,
            max_staleness=self._max_staleness,
            deals=list(worker.deals.values()),
            taken=_first_needed(box, unsettled),
        )
        if order != worker.order:
            mailbox.write_order(self._exchange, worker.name, order)
            worker.order = order


def _beat_of(worker: _Worker) -> Beat:
    assert worker.box is not None
    assert worker.box.beat is not None
    return worker.box.beat


def _first_needed(box: _Box, kept: set[Path]) -> int:
    """Return the number of the first group of a box that is undecided, or finished and not settled."""
    groups = box.beat["groups"] if box.beat else []
    for group in groups:
        if group["number"] not in box.judged or group_path(box.folder, group["number"]) in kept:
            return group["number"]
    return groups[-1]["number"] + 1 if groups else 0
