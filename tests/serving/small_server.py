"""A small HTTP server that stands for vLLM where that is not installed: `serve.python=PYTHON small_server.py`

It takes vLLM's words, loads the real middleware it is given, and answers every path behind it with 200,
control routes too: what is refused, the gate has refused. `{"delay_s": 2}` in a completion makes it take so
long.

    SMALL_SERVER=dies       it ends with status 3 before it listens
    SMALL_SERVER=open       with the middleware in front of /health alone
    SMALL_SERVER=stranger   without the middleware: it has no key
    SMALL_SERVER=silent     it never listens
    SMALL_SERVER=stubborn   it leaves by SIGKILL only
"""

import argparse
import asyncio
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import MutableMapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Message = MutableMapping[str, Any]


async def answer(scope: Message, receive: Any, send: Any) -> None:
    """The application behind the gate."""
    body = (await receive())["body"]
    asked = json.loads(body) if body else {}
    await asyncio.sleep(asked.get("delay_s", 0))
    said = json.dumps({"path": scope["path"], "choices": [{"text": "yes"}]}).encode()
    length = str(len(said)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": said})


class Handler(BaseHTTPRequestHandler):
    """Each request as an ASGI scope."""

    app: Any = staticmethod(answer)

    def _run(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        scope = {"type": "http", "method": self.command, "path": self.path, "headers": headers}

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.send_response(message["status"])
                for name, value in message["headers"]:
                    self.send_header(name.decode(), value.decode())
                self.end_headers()
            else:
                self.wfile.write(message["body"])

        asyncio.run(self.app(scope, receive, send))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing, as vLLM with --disable-uvicorn-access-log."""


for each in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
    setattr(Handler, f"do_{each}", Handler._run)


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
    ThreadingHTTPServer((asked.host, asked.port), Handler).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "-c":  # the question whether this interpreter has vLLM
        sys.exit(0)
    main(sys.argv[1:])
