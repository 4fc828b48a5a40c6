"""What one load level of a load test has measured, and what several of them say of the server.

level.hear(answer); level.close(...)
level.finished_per_s, level.first_s.percentile(99), level.failures
best = saturation(levels)               # the highest rate that it keeps up with, without a failure
failed_below(levels, best)              # what should not have failed
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from r1hpc.serving.stream import Answer

KEEPS_UP = 0.95
"""Of what is offered must be finished as it comes."""
_STEP = math.log(1.01)
PERCENTILES = (50, 95, 99)


class Distribution:
    """Times in classes of 1 %, so that hours of tokens take no room: a percentile is true to 0.5 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._sum = 0.0

    def add(self, value_s: float) -> None:
        self._counts[round(math.log(max(value_s, 1e-6)) / _STEP)] += 1
        self._sum += value_s

    def __len__(self) -> int:
        return self._counts.total()

    def percentile(self, percent: float) -> float | None:
        """The smallest time that so many percent do not exceed (nearest rank); None without any."""
        rank, seen = math.ceil(percent / 100 * len(self)), 0
        for each in sorted(self._counts):
            seen += self._counts[each]
            if seen >= rank:
                return math.exp(each * _STEP)
        return None

    def as_json(self) -> dict[str, Any]:
        mean = {"mean": self._sum / len(self)} if len(self) else {}
        return {"count": len(self), **mean, **{f"p{p}": self.percentile(p) for p in PERCENTILES}}


@dataclass
class Level:
    """One load for one length of time. Rates are per second, times in seconds."""

    kind: str
    """closed: so many clients, each of which asks again once it is answered; open: requests come at a rate,
    answered or not; soak: open, for long."""
    asked: float
    """Clients, or requests/s."""
    seconds: float
    """So long requests were sent."""
    begun: int = 0
    finished: int = 0
    num_tokens: int = 0
    num_events: int = 0
    """Events in which those tokens came."""
    prompt_tokens: int = 0
    """Of all finished ones, as the server counts them."""
    failures: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
    """What the server said of the first failure of a kind."""
    first_s: Distribution = field(default_factory=Distribution)
    gap_s: Distribution = field(default_factory=Distribution)
    latency_s: Distribution = field(default_factory=Distribution)
    late_s: Distribution = field(default_factory=Distribution)
    """How late the generator itself was, each time it was due."""
    is_gone: bool = False
    """Nobody listened any more; it ended early."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since it began, bytes)."""
    _last_end: float = 0.0

    def hear(self, answer: Answer, now: float) -> None:
        """Count one answer; `now` is since the level began."""
        if answer.failure:
            self.failures[answer.failure] += 1
            self.said.setdefault(answer.failure, answer.detail)
            return
        self.finished += 1
        self._last_end = max(self._last_end, now)
        self.num_tokens += answer.num_tokens
        self.num_events += 1 + len(answer.gaps_s)
        self.prompt_tokens += answer.prompt_tokens or 0
        self.latency_s.add(answer.ended - answer.due)
        if answer.first_s is not None:
            self.first_s.add(answer.first_s)
        for gap in answer.gaps_s:
            self.gap_s.add(gap)

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def unfinished(self) -> int:
        """Neither finished nor failed when the time to drain was over."""
        return self.begun - self.finished - self.failed

    @property
    def is_clean(self) -> bool:
        """All that was asked was answered."""
        return self.begun > 0 and not self.failed and not self.unfinished

    @property
    def offered_per_s(self) -> float:
        """Requests that were sent."""
        return self.begun / self.seconds

    @property
    def span_s(self) -> float:
        """The time in which the finished ones were served.

        Clients in a closed loop all begin at once, so that it lasts until the last one has its answer. In
        an open one requests are under way at its begin as at its end; only a backlog makes it longer, and
        an undisturbed answer (the tenth percentile) is none.
        """
        undisturbed = 0.0 if self.kind == "closed" else self.latency_s.percentile(10) or 0.0
        return max(self.seconds, self._last_end - undisturbed)

    @property
    def finished_per_s(self) -> float:
        return self.finished / self.span_s

    @property
    def tokens_per_s(self) -> float:
        """Made tokens of the finished ones."""
        return self.num_tokens / self.span_s

    @property
    def keeps_up(self) -> bool:
        """Nothing heaps up; of a closed loop, which waits for its answers, that is so."""
        return self.kind == "closed" or self.finished_per_s >= KEEPS_UP * self.offered_per_s

    def as_json(self) -> dict[str, Any]:
        name = "clients" if self.kind == "closed" else "rate_per_s"
        return {
            "kind": self.kind,
            name: self.asked,
            "seconds": self.seconds,
            "begun": self.begun,
            "finished": self.finished,
            "failed": dict(self.failures),
            "said": {kind: said for kind, said in self.said.items() if said},
            "unfinished": self.unfinished,
            "server_gone": self.is_gone,
            "offered_per_s": self.offered_per_s,
            "finished_per_s": self.finished_per_s,
            "keeps_up": self.keeps_up,
            "tokens": self.num_tokens,
            "token_events": self.num_events,
            "tokens_per_s": self.tokens_per_s,
            "prompt_tokens": self.prompt_tokens,
            "ttft_s": self.first_s.as_json(),
            "inter_token_s": self.gap_s.as_json(),
            "latency_s": self.latency_s.as_json(),
            "generator_late_s": self.late_s.as_json(),
            "memory_bytes": self.memory,
        }


def saturation(levels: Sequence[Level]) -> Level | None:
    """The level that finishes most, of those that keep up without a failure; None: there is none."""
    good = [level for level in levels if level.kind != "soak" and level.is_clean and level.keeps_up]
    return max(good, key=lambda level: level.finished_per_s, default=None)


def failed_below(levels: Sequence[Level], best: Level | None) -> list[Level]:
    """Levels with a failure, or an answer that never came, that offer no more than the server can do."""
    closed = saturation([level for level in levels if level.kind == "closed"])

    def is_below(level: Level) -> bool:
        if best is None or level.kind == "soak":
            return True
        if level.kind == "closed":
            return closed is None or level.asked <= closed.asked
        return level.offered_per_s <= best.finished_per_s

    return [level for level in levels if level.begun and not level.is_clean and is_below(level)]


def slope_per_hour(samples: Sequence[tuple[float, float]]) -> float | None:
    """By least squares, without their first tenth, in which caches fill; None of fewer than three.

    Args:
        samples: (seconds, value).
    """
    until = samples[-1][0] / 10 if samples else 0.0
    kept = [(x, y) for x, y in samples if x >= until]
    if len(kept) < 3:
        return None
    mean_x, mean_y = (sum(column) / len(kept) for column in zip(*kept, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in kept)
    return 3600 * sum((x - mean_x) * (y - mean_y) for x, y in kept) / spread if spread else None
