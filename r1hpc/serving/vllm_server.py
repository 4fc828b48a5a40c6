"""Start vLLM's OpenAI server without its control routes, and require the key for the others.

process.py starts it, in the interpreter that has vLLM:

    PYTHON -m r1hpc.serving.vllm_server --model DIR --host ADDRESS …        # vLLM's own options
        --middleware r1hpc.serving.vllm_server.Gate                         # in the same process, as ASGI

vLLM's own key guards only some prefixes: /metrics, /tokenize and, with VLLM_SERVER_DEV_MODE, /pause and
/collective_rpc answer without it. Gate requires the key for every route, allows only SERVED, and counts the
answers. Until vLLM starts it needs the standard library alone.
"""

import ctypes
import hashlib
import hmac
import json
import os
import runpy
import signal
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NO_VLLM = 78
"""Exit status if the interpreter has no vLLM: EX_CONFIG of sysexits.h."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
KEY_FILE = "R1HPC_SERVE_KEY_FILE"
"""Variable with the name of the key file."""
ACTIVITY = "R1HPC_SERVE_ACTIVITY_FD"
"""Variable with the descriptor to which BEGIN and END of each answer are written."""
BEGIN, END = b"+", b"-"
SERVED = frozenset(
    [
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    ]
)
"""Method and path of all that is served."""

CHALLENGE, PROOF = "x-r1hpc-challenge", "x-r1hpc-proof"
"""Headers: the client sends a random word; the refusal proves the key with it without revealing it."""

_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]


def main() -> None:
    """Become the server."""
    if find_spec("vllm") is None:
        print(
            f"error: {sys.executable} has no vLLM: name one that has by serve.python=PYTHON", file=sys.stderr
        )
        sys.exit(NO_VLLM)
    # Die with the parent: a killed rank must not leave a server behind that holds its GPUs (prctl(2)).
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # the parent is already gone
        sys.exit(1)
    os.environ["VLLM_SERVER_DEV_MODE"] = "0"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


class Gate:
    """An ASGI 3 application around another one: 401 without the key, 404 for what is not SERVED."""

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        key = Path(os.environ[KEY_FILE]).read_bytes().strip()
        if not key:
            raise RuntimeError(f"the key file {os.environ[KEY_FILE]} is empty: remove it, and begin again")
        self._key = _digest(key)
        self._prove = partial(proof, key)
        self._activity = int(os.environ[ACTIVITY])
        os.set_blocking(self._activity, False)

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not hmac.compare_digest(_digest(_given_key(scope)), self._key):
            challenge = _header(scope, CHALLENGE.encode())
            told = [(PROOF.encode(), self._prove(challenge).encode())] if challenge else []
            await _refuse(send, 401, "give the server's key: Authorization: Bearer KEY", told)
        elif (scope["method"], scope["path"]) not in SERVED:
            await _refuse(send, 404, "not served here")
        elif scope["method"] == "POST":
            await self._counted(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _counted(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        self._tell(BEGIN)
        try:
            await self._app(scope, receive, send)
        finally:
            self._tell(END)

    def _tell(self, what: bytes) -> None:
        with suppress(OSError):  # the reader is gone, or sixty thousand requests behind
            os.write(self._activity, what)


def proof(key: bytes, challenge: bytes) -> str:
    """Return the proof of a random word that only an owner of the key can make (HMAC, RFC 2104)."""
    return hmac.new(key, b"r1hpc " + challenge, hashlib.sha256).hexdigest()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: _Message, name: bytes) -> bytes:
    """Return a header that occurs once; else empty."""
    values = [value for each, value in scope["headers"] if each == name]
    return bytes(values[0]) if len(values) == 1 else b""


def _given_key(scope: _Message) -> bytes:
    kind, _, key = _header(scope, b"authorization").partition(b" ")
    return bytes(key.strip()) if kind.lower() == b"bearer" else b""


async def _refuse(send: _Send, status: int, message: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += more
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    main()
