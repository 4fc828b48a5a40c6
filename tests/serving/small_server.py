"""A small HTTP server that stands for vLLM where that is not installed: `serve.python=PYTHON small_server.py`

It takes vLLM's words, loads the real middleware it is given, and answers every path behind it with 200,
control routes too: what is refused, the gate has refused. `{"delay_s": 2}` in a completion makes it take so
long.

    SMALL_SERVER=dies       it ends with status 3 before it listens
    SMALL_SERVER=open       with the middleware in front of /health alone
    SMALL_SERVER=stranger   without the middleware: it has no key
    SMALL_SERVER=silent     it never listens
    SMALL_SERVER=stubborn   it leaves by SIGKILL only

A completion asked with `"stream": true` comes as OpenAI's events, in chunks of HTTP/1.1, by a server that
saturates at a known rate: `STREAM="slots=4 first_s=0.1 token_s=0.02"`. So many requests are served at a time,
each until its max_tokens are out: slots / (first_s + (max_tokens - 1) * token_s) requests/s. Its faults:

    fail_every=10           every tenth is answered with 500
    break_every=10          every tenth breaks off after its first token
    hang_after=20           from the 21st on it takes requests, and answers none
"""

import argparse
import asyncio
import heapq
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Message = MutableMapping[str, Any]
STREAM = {
    name: float(value) for name, value in (each.split("=") for each in os.environ.get("STREAM", "").split())
}
"""How it streams."""
EVENTS = b"text/event-stream"
_free_at = [0.0] * int(STREAM.get("slots", 1000))
"""When each slot is free. They are booked by the clock, so that a busy machine costs no capacity."""
_lock = threading.Lock()
_count = 0
"""Streams that were asked for."""


async def answer(scope: Message, receive: Any, send: Any) -> None:
    """The application behind the gate."""
    body = (await receive())["body"]
    asked = json.loads(body) if body else {}
    if asked.get("stream"):
        await stream(asked, send)
        return
    if scope["path"] == "/tokenize":
        await whole(send, {"count": len(asked["prompt"].split())})
        return
    if scope["path"] == "/v1/models":
        await whole(send, {"data": [{"id": "little"}]})
        return
    await asyncio.sleep(asked.get("delay_s", 0))
    await whole(send, {"path": scope["path"], "choices": [{"text": "yes"}]})


async def whole(send: Any, said: dict[str, Any], status: int = 200) -> None:
    """An answer in one piece."""
    body = json.dumps(said).encode()
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


async def stream(asked: dict[str, Any], send: Any) -> None:
    """The tokens one by one, once a slot is free. Each request has a thread of its own, which may sleep."""
    global _count
    with _lock:
        _count += 1
        number = _count
    while number > STREAM.get("hang_after", math.inf):
        time.sleep(60)
    if number % STREAM.get("fail_every", math.inf) == 0:
        await whole(send, {"error": {"message": "planted"}}, 500)
        return
    num, token_s = asked.get("max_tokens", 4), STREAM.get("token_s", 0.0)
    with _lock:
        due = max(time.monotonic(), heapq.heappop(_free_at)) + STREAM.get("first_s", 0.0)
        heapq.heappush(_free_at, due + (num - 1) * token_s)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", EVENTS)]})
    if "messages" in asked:
        await _event(send, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for i in range(num):
        time.sleep(max(0.0, due - time.monotonic()))
        due += token_s
        piece = {"delta": {"content": " a"}} if "messages" in asked else {"text": " a"}
        await _event(send, {"choices": [{**piece, "finish_reason": "length" if i == num - 1 else None}]})
        if number % STREAM.get("break_every", math.inf) == 0:
            raise ConnectionAbortedError
    if asked.get("stream_options", {}).get("include_usage"):
        prompt = len(str(asked.get("prompt", "")).split())
        await _event(send, {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": num}})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _event(send: Any, said: dict[str, Any]) -> None:
    await send(
        {"type": "http.response.body", "body": b"data: %s\n\n" % json.dumps(said).encode(), "more_body": True}
    )


class Handler(BaseHTTPRequestHandler):
    """Each request as an ASGI scope."""

    app: Any = staticmethod(answer)
    protocol_version = "HTTP/1.1" if STREAM else "HTTP/1.0"
    _is_chunked = False

    def _run(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        scope = {"type": "http", "method": self.command, "path": self.path, "headers": headers}

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.send_response(message["status"])
                self._is_chunked = (b"content-type", EVENTS) in message["headers"]
                chunked = [(b"transfer-encoding", b"chunked")] if self._is_chunked else []
                for name, value in [*message["headers"], *chunked]:
                    self.send_header(name.decode(), value.decode())
                self.end_headers()
            elif self._is_chunked:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(message["body"]), message["body"]))
            else:
                self.wfile.write(message["body"])

        try:
            asyncio.run(self.app(scope, receive, send))
        except ConnectionError:  # who asked is gone, or is left
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing, as vLLM with --disable-uvicorn-access-log."""


for each in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
    setattr(Handler, f"do_{each}", Handler._run)


class Listener(ThreadingHTTPServer):
    """Many may come at once."""

    request_queue_size = 1024
    daemon_threads = True


def partly(gate: Any) -> Any:
    async def app(scope: Message, receive: Any, send: Any) -> None:
        await (gate if scope["path"] == "/health" else answer)(scope, receive, send)

    return app


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--middleware")
    asked, _ = parser.parse_known_args(argv)
    mode = os.environ.get("SMALL_SERVER", "")
    print("the small server begins", flush=True)
    if mode == "dies":
        print("RuntimeError: the small server cannot load its weights", flush=True)
        sys.exit(3)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while mode == "silent":
        time.sleep(60)
    if mode != "stranger":
        module, name = asked.middleware.rsplit(".", 1)
        gate = getattr(importlib.import_module(module), name)(answer)
        Handler.app = staticmethod(partly(gate) if mode == "open" else gate)
    Listener((asked.host, asked.port), Handler).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "-c":  # the question whether this interpreter has vLLM
        sys.exit(0)
    main(sys.argv[1:])
