"""Measure a server with 1, 2, 4 … clients that each ask again once answered (a closed loop).

For r1hpc/loadtest.py, the command:

    for level in measure(target, Prompts(num_words=128, max_tokens=64), clients=(), seconds=30):
        level["requests_per_s"], level["latency_s"]["p95"], level["failed"]

guidellm and `vllm bench serve` also send requests at a rate, or as in recorded traffic. guidellm 0.8.1 needs
an environment of 1.4 GB, and gives the key to any listener.
"""

import http.client
import json
import math
import random
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.base.names import printable
from r1hpc.serving.client import Client

Level = dict[str, Any]
"""The result of a number of clients, as --json has it: rates are of finished requests, times in seconds."""
MOST_CLIENTS = 1024
_GROWTH = 1.05
"""If twice the clients finish no more than that times as many, throughput has stopped growing."""
_TIMEOUT_S = 60.0
"""Longest silence within an answer, and longest wait for the answers that are due when a level ends."""
_MOST_FAILURES = 3
"""Failures in a row after which a client stops."""
_PAUSE_S = 0.2
_MOST_DETAIL = 200
_WORDS = (
    *("one", "two", "tree", "house", "water", "light", "stone", "river", "time", "day", "night", "hand"),
    *("word", "line", "point", "form", "number", "sound", "city", "road", "earth", "wind", "field", "plant"),
)


@dataclass(frozen=True)
class Target:
    name: str
    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    is_proven: bool = True
    """False: the key is given to a server that cannot prove to have it."""

    def check(self) -> None:
        """Raise StateError if the server is gone, or does not have the key."""
        client = Client(self.url)
        is_asked = self.key is not None and self.is_proven
        proof = client.is_ours(self.key or "") if is_asked else client.ask("/health", None)
        if proof is None:
            raise StateError(f"nobody answers at {self.url}")
        if not proof:
            raise StateError(
                f"who answers at {self.url} does not have this key and did not get it; a server that is not "
                "r1hpc's is given it with --unproven"
            )


@dataclass
class Prompts:
    """Bodies of requests: random words, so that no prefix cache helps, or those of a file, in turn."""

    num_words: int
    max_tokens: int
    given: Sequence[Mapping[str, Any]] = ()
    """Each with `prompt` or `messages`. Their answers may end before max_tokens."""
    _count: int = 0

    def next(self) -> tuple[str, dict[str, Any]]:
        """Return (path, body without the model)."""
        if self.given:
            body = dict(self.given[self._count % len(self.given)])
            self._count += 1
        else:
            body = {"prompt": " ".join(random.choices(_WORDS, k=self.num_words)), "ignore_eos": True}
        body |= {"max_tokens": self.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        return ("/v1/chat/completions" if "messages" in body else "/v1/completions"), body


@dataclass
class Answer:
    """The result of one request. Times are seconds since it was sent."""

    latency_s: float = 0.0
    first_s: float | None = None
    """To the first token."""
    num_tokens: int = 0
    """As the server counts them, else the events that held some."""
    failure: str = ""
    """Its kind; empty: it finished."""
    detail: str = ""
    """The server's message about it."""


def measure(target: Target, prompts: Prompts, clients: Sequence[int], seconds: float) -> Iterator[Level]:
    """Yield the level of each number of clients, or of 1, 2, 4 … until throughput stops growing.

    It ends early after a level in which no request finished. Raise StateError if the server is gone, or
    another process has its port.
    """
    before = 0.0
    for count in clients or [2**power for power in range(MOST_CLIENTS.bit_length())]:
        target.check()
        level = _measure(target, prompts, count, seconds)
        yield level
        is_saturated = level["failed"] or level["requests_per_s"] <= before * _GROWTH
        if not level["finished"] or (not clients and is_saturated):
            return
        before = level["requests_per_s"]


def _measure(target: Target, prompts: Prompts, count: int, seconds: float) -> Level:
    answers: list[Answer] = []
    began = time.monotonic()
    until = began + seconds

    def ask_again_and_again() -> None:
        failed = 0
        while time.monotonic() < until and failed < _MOST_FAILURES:
            answer = ask(target, *prompts.next(), before=until + _TIMEOUT_S)
            answers.append(answer)
            failed = failed + 1 if answer.failure else 0
            time.sleep(_PAUSE_S if failed else 0)

    # Daemons: an interrupt ends the test at once.
    threads = [threading.Thread(target=ask_again_and_again, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _level(count, time.monotonic() - began, answers)


def _level(clients: int, span_s: float, answers: Sequence[Answer]) -> Level:
    """Return the rates and times of the finished requests, and the failures with the first detail of each."""
    finished = [answer for answer in answers if not answer.failure]
    firsts = [answer.first_s for answer in finished if answer.first_s is not None]
    return {
        "clients": clients,
        "seconds": span_s,
        "finished": len(finished),
        "failed": dict(Counter(answer.failure for answer in answers if answer.failure)),
        "details": {answer.failure: answer.detail for answer in reversed(answers) if answer.detail},
        "requests_per_s": len(finished) / span_s,
        "tokens_per_s": sum(answer.num_tokens for answer in finished) / span_s,
        "ttft_s": _percentiles(firsts),
        "latency_s": _percentiles([answer.latency_s for answer in finished]),
    }


def ask(target: Target, path: str, body: Mapping[str, Any], before: float = math.inf) -> Answer:
    """Send one request and read its streamed answer.

    Args:
        before: time.monotonic() at which an answer that is still coming counts as a failure.
    """
    answer, began = Answer(), time.monotonic()
    try:
        with Client(target.url).post(path, target.key, {"model": target.model, **body}, _TIMEOUT_S) as stream:
            _read(stream, answer, began, before)
    except urllib.error.HTTPError as error:
        answer.failure, answer.detail = f"HTTP {error.code}", _message(error)
    except TimeoutError:
        answer.failure = "no answer in time"
    except (OSError, http.client.HTTPException) as error:
        answer.failure, answer.detail = "connection broken", str(error)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        answer.failure, answer.detail = "not OpenAI's stream", str(error)
    answer.latency_s = time.monotonic() - began
    if target.key:  # the server may have repeated it
        answer.detail = answer.detail.replace(target.key, "KEY")
    answer.detail = printable(" ".join(answer.detail.split()))[:_MOST_DETAIL]
    return answer


def _read(stream: Any, answer: Answer, began: float, before: float) -> None:
    is_done = False
    for line in stream:
        if time.monotonic() > before:
            raise TimeoutError
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        event = json.loads(line[5:])
        if error := event.get("error"):
            answer.failure, answer.detail = "error in the stream", str(error)
            return
        for choice in event.get("choices") or []:
            is_done = is_done or bool(choice.get("finish_reason"))
            # Chat begins with an event that holds the role alone, and some servers end with an empty one.
            if choice.get("text") or any(
                value for name, value in (choice.get("delta") or {}).items() if name != "role"
            ):
                answer.num_tokens += 1
                if answer.first_s is None:
                    answer.first_s = time.monotonic() - began
        counted = (event.get("usage") or {}).get("completion_tokens")
        if isinstance(counted, int):
            answer.num_tokens = counted
    if not is_done:
        answer.failure = "connection broken"
    elif answer.first_s is None:
        answer.failure = "no token"


def _message(error: urllib.error.HTTPError) -> str:
    """Return the message of OpenAI's error object, or the body; empty if the server breaks off."""
    try:
        body = error.read()
    except (OSError, http.client.HTTPException):
        return ""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")


def _percentiles(values: list[float]) -> dict[str, float | None]:
    """Return p50 and p95, the smallest value that this percentage does not exceed; None if there is none."""
    values = sorted(values)
    places = {"p50": math.ceil(0.50 * len(values)), "p95": math.ceil(0.95 * len(values))}
    return {name: values[max(0, place - 1)] if values else None for name, place in places.items()}
