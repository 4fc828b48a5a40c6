"""Send one streamed completion and time its tokens: HTTP/1.1 and server-sent events on asyncio.

    answer = await complete(target, path, prompt_body, due=time.perf_counter())
    answer.failure, answer.first_s, answer.gaps_s, answer.num_tokens

Each request opens its own connection, and its time to the first token includes that.
"""

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from r1hpc.base.names import printable
from r1hpc.serving.client import authorization

NumT = TypeVar("NumT", int, int | None)
_MOST_DETAIL = 200
NO_CONNECTION = "no connection"
NO_DESCRIPTOR = "no file descriptor left here"
BROKEN = "connection broken"


@dataclass(frozen=True)
class Target:
    """The server to ask."""

    url: str
    """http://HOST:PORT, perhaps with a path before /v1."""
    model: str
    key: str | None = field(default=None, repr=False)
    """Set only for a server that has proven to have it."""


@dataclass
class Answer:
    """Result of one request. Times are seconds; the clock is time.perf_counter."""

    due: float
    """When it should be sent; a late sender adds to the answer's times."""
    ended: float = 0.0
    first_s: float | None = None
    """From when it was due to its first token; None: none came."""
    gaps_s: list[float] = field(default_factory=list)
    """Between consecutive tokens, as they came: two in one event have no gap."""
    num_tokens: int = 0
    """As the server counts them, else the events that held some."""
    prompt_tokens: int | None = None
    failure: str = ""
    """Its kind; empty: it finished."""
    detail: str = ""
    """The server's message about it."""
    _last: float = 0.0
    _is_done: bool = False

    def hear(self, event: Mapping[str, Any], now: float) -> None:
        """Count what one event contains."""
        if error := event.get("error"):
            self.failure, self.detail = "error in the stream", _said(error)
        usage = event.get("usage") or {}
        self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
        choices = event.get("choices") or []
        if any(choice.get("finish_reason") for choice in choices):
            self._is_done = True
        if any(_has_token(choice) for choice in choices):
            self.num_tokens += 1
            if self.first_s is None:
                self.first_s = now - self.due
            else:
                self.gaps_s.append(now - self._last)
            self._last = now
        self.num_tokens = _count(usage.get("completion_tokens"), self.num_tokens)

    def close(self) -> None:
        """Record the end of the stream."""
        if not self.failure and not self._is_done:
            self.failure = "cut off"
        elif not self.failure and self.first_s is None:
            self.failure = "no token"


async def complete(target: Target, path: str, body: Mapping[str, Any], due: float) -> Answer:
    """Ask, and read to the end. If cancelled, it leaves at once."""
    answer, writer = Answer(due), None
    where = urlsplit(target.url)
    try:
        try:
            port = where.port or (443 if where.scheme == "https" else 80)
            reader, writer = await asyncio.open_connection(
                where.hostname, port, ssl=where.scheme == "https" or None
            )
        except OSError as error:
            is_ours = error.errno in (errno.EMFILE, errno.ENFILE)
            answer.failure = NO_DESCRIPTOR if is_ours else NO_CONNECTION
            answer.detail = error.strerror or str(error)
            return answer
        writer.write(_request(target, where.path + path, where.netloc, body))
        await _read(reader, answer)
    except (OSError, EOFError):  # includes asyncio.IncompleteReadError
        answer.failure = BROKEN
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        answer.failure, answer.detail = "not OpenAI's stream", str(error)
    finally:
        answer.ended = time.perf_counter()
        answer.detail = _shown(answer.detail, target.key)
        if writer is not None:
            writer.transport.abort()
    return answer


def _request(target: Target, path: str, host: str, body: Mapping[str, Any]) -> bytes:
    content = json.dumps({"model": target.model, **body}).encode()
    headers = {
        "Host": host.rpartition("@")[2],
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "Connection": "close",
        **authorization(target.key),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    status, headers = await _head(reader)
    if status != 200:
        answer.failure = f"HTTP {status}"
        said = b"".join([piece async for piece in _pieces(reader, headers)])
        answer.detail = _said(_parsed(said))
        return
    if "text/event-stream" not in headers.get("content-type", ""):
        raise ValueError(f"content-type {headers.get('content-type', 'is missing')}")
    async for event in _events(reader, headers):
        answer.hear(event, time.perf_counter())
    answer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return (HTTP status, headers by their names in lower case)."""
    first = await _line(reader)
    if not first.startswith(b"HTTP/1."):
        raise ValueError("no HTTP/1.1")
    headers: dict[str, str] = {}
    while line := (await _line(reader)).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first.split()[1]), headers


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Yield the body as it comes (RFC 9112, section 6)."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await _line(reader)).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(65536):
            yield piece


async def _events(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of the stream, up to its [DONE]."""
    held = b""
    async for piece in _pieces(reader, headers):
        *whole, held = (held + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            data = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data and data != b"[DONE]":
                yield json.loads(data)


def _count(value: Any, known: NumT) -> int | NumT:
    """Return the server's count, if it gives a number."""
    return value if isinstance(value, int) else known


def _has_token(choice: Mapping[str, Any]) -> bool:
    """True if the event has text: chat begins with one that has none, and some servers end with one."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or not choice.get("finish_reason")
    held = [value for name, value in delta.items() if name != "role"]
    return any(held) or (bool(held) and "role" not in delta and not choice.get("finish_reason"))


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _said(error: Any) -> str:
    """Return the message of OpenAI's error object, or of what replaces it."""
    while isinstance(error, dict):
        error = error.get("error") or error.get("message") or str(error)
    return str(error)


def _shown(words: str, key: str | None) -> str:
    """Return the words on one line, without the key, in case the server repeated it."""
    words = words.replace(key, "KEY") if key else words
    return printable(" ".join(words.split()))[:_MOST_DETAIL]
