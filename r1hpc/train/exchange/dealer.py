"""Decide which worker samples which item, and which of the finished groups count.

    dealer.want(7, items)                                # rollout 7 will train on these
    dropped = dealer.round(latest, time.monotonic())     # about once a second
    groups = dealer.finished(7); ...; dealer.settle_before(next_item)

An item is free, dealt to a start of a worker, then finished; settled once its rollout is on record. It is
free again if its worker is silent, has left or has another start, or if its group is rejected. The first
group of an item counts; a later one is a twin. A new dealer, after a restart of the trainer, finds in the
boxes what was finished. Workers are found by listing `workers_dir`, which NFS may show a minute late.
"""

import math
import shutil
from collections import Counter
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
    worker: str
    dropped: str = ""
    is_twin: bool = False


@dataclass
class _Box:
    """A start of a worker, as the dealer has seen it."""

    folder: Path
    beat: Beat
    changed_at: float = -math.inf
    """When its count was seen to change; never, for a box left by a start that is gone."""
    is_gone: bool = False
    """It was silent at the last round, or has left."""


@dataclass
class Dealer:
    """Deals the items of the coming rollouts to the workers. Only one thread may use it."""

    exchange: Path
    workers_dir: Path
    token: str
    """The trainer's attempt has it."""
    max_staleness: int
    in_flight: int
    """The most groups that a worker holds at once."""
    silence_s: float = 30.0
    came_at: float = 0.0
    """When the last group came, by the clock of `round`."""
    num_there: int = 0
    """Workers that were heard, at the last round."""
    _starts: dict[str, list[Path]] = field(default_factory=dict)
    """The boxes of each worker, the current one last."""
    _boxes: dict[Path, _Box] = field(default_factory=dict)
    _wanted: dict[int, int] = field(default_factory=dict)
    """Item to rollout, in the order of dealing."""
    _deals: dict[int, tuple[Path, Deal]] = field(default_factory=dict)
    """By item: the box of the start that is to sample it."""
    _next_deal: int = 0
    _finished: dict[int, Finished] = field(default_factory=dict)
    _settled_before: int = 0
    _judged: set[Path] = field(default_factory=set)
    """Groups that were found finished or were dropped."""
    _num_rejected: Counter[Path] = field(default_factory=Counter)
    """By box."""
    _digests: dict[int, str] = field(default_factory=dict)
    _orders: dict[str, Order] = field(default_factory=dict)
    """As they were written."""

    def want(self, rollout: int, items: Sequence[int]) -> None:
        """Ask for a group of each item, for this rollout, after everything that was asked for before."""
        assert not self._wanted.keys() & set(items), "an item is wanted once"
        self._wanted |= dict.fromkeys(items, rollout)

    def settle_before(self, item: int) -> None:
        """Forget the items below `item`, which are on record: other groups of them are twins. Remove their
        groups from boxes of starts that are gone, and boxes that are no longer read."""
        self._settled_before = item
        self.give_up([one for one in self._wanted if one < item])
        needed = {finished.path.parent for finished in self._finished.values()}
        currents = [starts[-1] for starts in self._starts.values() if starts]
        read = {folder for starts in self._starts.values() for folder in starts}
        for folder, box in [*self._boxes.items()]:
            if folder not in read | needed:  # of a start long ago
                shutil.rmtree(folder, ignore_errors=True)
                del self._boxes[folder]
            elif box.is_gone or folder not in currents:  # it can remove its settled groups no longer
                for group in box.beat["groups"]:
                    if group["item"] < item:
                        group_path(folder, group["number"]).unlink(missing_ok=True)

    def give_up(self, items: Iterable[int]) -> None:
        """Want these items no longer."""
        for item in items:
            for state in (self._wanted, self._finished, self._deals):
                state.pop(item, None)

    def reject(self, item: int, reason: str) -> Finished:
        """Drop a finished group that cannot be used, for `reason`; its item is dealt again."""
        finished = self._finished.pop(item)
        self._num_rejected[finished.path.parent] += 1
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
        for worker in sorted(self.workers_dir.glob("*")):
            # Empty: it has not begun, or cannot be read in this round.
            self._starts[worker.name] = mailbox.read_boxes(worker) or self._starts.get(worker.name, [])
        folders = [folder for starts in self._starts.values() for folder in starts]
        dropped = [one for folder in folders for one in self._read(folder, now)]
        currents = [self._boxes.get(starts[-1]) for starts in self._starts.values() if starts]
        there = [box for box in currents if box and self._is_there(box, now)]
        folders = [box.folder for box in there]
        self._deals = {item: deal for item, deal in self._deals.items() if deal[0] in folders}
        self._deal([box for box in there if self._digests.get(box.beat["version"]) == box.beat["digest"]])
        for name, starts in self._starts.items():
            if starts:
                self._write_order(name, starts[-1])
        self.num_there = len(there)
        return dropped

    def _read(self, folder: Path, now: float) -> list[Finished]:
        """Read a box's beat; return the groups dropped from it."""
        beat = mailbox.read_beat(folder)
        if beat is None:
            return []
        box = self._boxes.setdefault(folder, _Box(folder, beat))
        if beat["count"] != box.beat["count"]:
            box.changed_at = now
        box.beat = beat
        dropped = []
        for group in beat["groups"]:
            path, rollout = group_path(folder, group["number"]), self._wanted.get(group["item"])
            # Undecided while nobody wants it.
            if path not in self._judged and (rollout is not None or group["item"] < self._settled_before):
                self._judged.add(path)
                finished = self._judge(path, group, rollout)
                if finished.dropped:
                    dropped.append(finished)
                else:
                    self._finished[finished.item], self.came_at = finished, now
                    self._deals.pop(finished.item, None)
        return dropped

    def _judge(self, path: Path, group: Group, rollout: int | None) -> Finished:
        item, oldest, newest = group["item"], group["oldest"], group["newest"]
        finished = Finished(item, path, group["sha256"], oldest, path.parent.parent.name)
        if rollout is None or item in self._finished:
            return replace(finished, dropped="another group of this item was first", is_twin=True)
        first = rollout - self.max_staleness
        if first <= oldest <= newest <= rollout:
            return finished
        reason = f"sampled by versions {oldest} to {newest}, and rollout {rollout} takes {first} to {rollout}"
        return replace(finished, dropped=reason)

    def _is_there(self, box: _Box, now: float) -> bool:
        """True if a start is heard, has not left, and does not write damaged files."""
        box.is_gone = now - box.changed_at > self.silence_s or box.beat["left"] != ""
        return not box.is_gone and self._num_rejected[box.folder] < _MOST_REJECTED

    def _deal(self, able: Sequence[_Box]) -> None:
        """Deal free items in their order, each to the worker with the fewest that may have it."""
        num_dealt = Counter(folder for folder, _ in self._deals.values())
        for item, rollout in self._wanted.items():
            if item in self._deals or item in self._finished:
                continue
            fitting = [
                box.folder
                for box in able
                if num_dealt[box.folder] < self.in_flight
                and 0 <= rollout - box.beat["version"] <= self.max_staleness
            ]
            if fitting:
                folder = min(fitting, key=lambda one: num_dealt[one])
                self._deals[item] = folder, Deal(number=self._next_deal, item=item, rollout=rollout)
                self._next_deal += 1
                num_dealt[folder] += 1

    def _write_order(self, worker: str, folder: Path) -> None:
        order = Order(
            token=self.token,
            box=folder.name,
            max_staleness=self.max_staleness,
            deals=[deal for box, deal in self._deals.values() if box == folder],
            taken=self._first_needed(folder),
        )
        if order != self._orders.get(worker):
            mailbox.write_order(self.exchange, worker, order)
            self._orders[worker] = order

    def _first_needed(self, folder: Path) -> int:
        """Return the number of the first group of a box that is undecided, or finished and not settled."""
        kept = {finished.path for finished in self._finished.values()}
        groups = self._boxes[folder].beat["groups"] if folder in self._boxes else []
        for group in groups:
            path = group_path(folder, group["number"])
            if path not in self._judged or path in kept:
                return group["number"]
        return groups[-1]["number"] + 1 if groups else 0
