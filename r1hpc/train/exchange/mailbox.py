"""Pass work to rollout workers and results back, in small files that have one writer each.

    exchange/orders/w03.json                         the trainer: what this worker is to sample
    workers/w03/current.json                         a start of the worker: its box, after the earlier ones
    workers/w03/box-<attempt>-<token>/beat.json      the same start: it lives, its weights, its groups
    workers/w03/box-<attempt>-<token>/g-000017.npz   the same start: a finished group

    box = Box.opened(worker_dir, attempt, token)     # the worker
    box.commit(item, (3, 3), lambda path: write_groups(path, group, policy_id))
    order = read_order(exchange, "w03")

Every file is replaced by a rename and opened anew each round. A reader looks up only names that such a file
announced: NFS may remember for a minute that a name was missing. No file holds a time: the trainer's own
clock measures how long `count` has not changed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import read_object, write_atomic
from r1hpc.base.names import check_name
from r1hpc.base.records import Count

_BOXES_READ = 4
"""A worker's newest starts whose boxes are read; groups of earlier starts are sampled again."""


class Deal(TypedDict):
    """An item to sample. `number` is the deal's: an item that was lost is dealt again under another one."""

    number: Count
    item: Count
    rollout: Count
    """The rollout that will train on it."""


class Order(TypedDict):
    """All that a worker is to sample, not a change to an earlier order."""

    token: str
    """The trainer's attempt; an order of another attempt than latest.json's is void."""
    box: str
    """The start of the worker that it is for."""
    max_staleness: Count
    deals: list[Deal]
    taken: Count
    """Groups below this number are no longer needed, and leave the box."""


class Group(TypedDict):
    """A finished group in a box."""

    number: Count
    item: Count
    oldest: Count
    """The oldest and the newest version that sampled one of its tokens."""
    newest: Count
    sha256: str


class Beat(TypedDict):
    """A start of a worker, as it was when it wrote this."""

    count: Count
    """Grows with every beat."""
    version: int
    """The version that it samples with; -1 before the first."""
    digest: str
    """The digest of the weights in its network, see versions.digest_of."""
    groups: list[Group]
    committed: Count
    """Groups of this worker, those of its earlier starts too."""
    left: str
    """Why it has left; empty while it is there."""


class _Current(TypedDict):
    boxes: list[str]
    """The newest starts' boxes, the current one last."""


def read_boxes(worker_dir: Path) -> list[Path]:
    """Return the boxes of a worker's newest starts, the current one last."""
    current = read_object(worker_dir / "current.json", _Current)
    return [worker_dir / check_name(name, "box") for name in current.get("boxes", [])]


def read_beat(box: Path) -> Beat | None:
    """Return a box's last beat; None if none can be read now."""
    return cast(Beat, read_object(box / "beat.json", Beat)) or None


def group_path(box: Path, number: int) -> Path:
    return box / f"g-{number:06d}.npz"


def write_order(exchange: Path, worker: str, order: Order) -> None:
    """Replace a worker's order. Only the trainer's attempt that holds the run's fence may."""
    folder = exchange / "orders"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / f"{worker}.json", json.dumps(order) + "\n", durable=False)


def read_order(exchange: Path, worker: str) -> Order | None:
    """Return a worker's order; None if none can be read now."""
    return cast(Order, read_object(exchange / "orders" / f"{worker}.json", Order)) or None


@dataclass
class Box:
    """The box of one start of a worker, which alone writes into it."""

    folder: Path
    count: int = 0
    version: int = -1
    digest: str = ""
    committed: int = 0
    groups: list[Group] = field(default_factory=list)
    left: str = ""

    @classmethod
    def opened(cls, worker_dir: Path, attempt: int, token: str) -> "Box":
        """Make the box of this start and announce it. The first beat is there before its name."""
        box = cls(worker_dir / f"box-{attempt}-{check_name(token, 'token')}")
        box.folder.mkdir(mode=0o700, parents=True)
        earlier = read_boxes(worker_dir)
        before = read_beat(earlier[-1]) if earlier else None
        box.committed = before["committed"] if before else 0
        box.beat()
        names = [*(path.name for path in earlier), box.folder.name][-_BOXES_READ:]
        failpoint("box.announce")
        write_atomic(worker_dir / "current.json", json.dumps({"boxes": names}) + "\n")
        return box

    def is_current(self) -> bool:
        """False once a newer start of the worker has announced its own box."""
        boxes = read_boxes(self.folder.parent)
        return not boxes or boxes[-1] == self.folder

    def beat(self) -> None:
        """Show that this start lives, with its weights and its groups."""
        self.count += 1
        beat = {name: getattr(self, name) for name in Beat.__annotations__}
        write_atomic(self.folder / "beat.json", json.dumps(beat) + "\n", durable=False)

    def commit(self, item: int, versions: tuple[int, int], write: Callable[[Path], str]) -> None:
        """Write a group by `write`, which returns its sha256, and announce it."""
        number, self.committed = self.committed, self.committed + 1
        sha256 = write(group_path(self.folder, number))
        failpoint("box.commit")
        oldest, newest = versions
        self.groups.append(Group(number=number, item=item, oldest=oldest, newest=newest, sha256=sha256))
        self.beat()

    def forget(self, taken: int) -> None:
        """Remove the groups below number `taken`."""
        gone = [group for group in self.groups if group["number"] < taken]
        if gone:
            self.groups = self.groups[len(gone) :]
            self.beat()
        for group in gone:
            group_path(self.folder, group["number"]).unlink(missing_ok=True)
