"""Which records count, and which part of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from r1hpc.accounting.hours import Allocation


@dataclass(frozen=True)
class Selection:
    """By whose they are and when: what is None selects all."""

    user: str | None = None
    account: str | None = None
    start: float | None = None
    """Unix seconds; what an allocation held before does not count."""
    end: float | None = None
    runs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Job id -> (run, stage), for the jobs whose run is known."""

    @property
    def columns(self) -> list[str]:
        """What records must have so that it can be decided which are selected, as sacct spells them."""
        chosen = {"User": self.user, "Account": self.account}
        return [name for name, value in chosen.items() if value is not None]

    def clip(self, allocations: Iterable[Allocation]) -> list[Allocation]:
        """The parts that are selected."""
        clipped = [
            replace(
                a,
                start=a.start if self.start is None else max(a.start, self.start),
                end=a.end if self.end is None else min(a.end, self.end),
            )
            for a in allocations
            if self.user in (None, a.user) and self.account in (None, a.account)
        ]
        if self.start is None and self.end is None:
            return clipped
        return [a for a in clipped if a.end > a.start]
