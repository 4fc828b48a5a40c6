"""What stands before vLLM's routes. That vLLM itself is behind it: test_vllm_server.py."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.serving.vllm_server import ACTIVITY, BEGIN, CHALLENGE, END, KEY_FILE, PROOF, SERVED, Gate, proof

KEY = "planted-key"
CONTROL = [
    *("/pause", "/resume", "/is_paused", "/collective_rpc", "/reset_prefix_cache", "/sleep", "/wake_up"),
    *("/server_info", "/update_weights", "/scale_elastic_ep", "/load", "/invocations", "/ping", "/docs"),
    *(
        "/openapi.json",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/start_profile",
        "/abort_requests",
    ),
    *("//v1/models", "/v1/models/", "/v1/../pause", "/V1/models", "", "/"),
]


@pytest.fixture
def activity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end of the pipe that is read."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    monkeypatch.setenv(KEY_FILE, str(key))
    monkeypatch.setenv(ACTIVITY, str(writing))
    yield reading
    os.close(reading)
    os.close(writing)


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """An application that does whatever it is asked."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope.get("path", "").encode()})


def ask(method: str, path: str, *authorizations: str, kind: str = "http", app: Any = behind) -> list[Any]:
    """What the gate sends back."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"authorization", value.encode()) for value in authorizations]
    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(Gate(app)(scope, receive, send))
    return sent


def status(method: str, path: str, *authorizations: str) -> int:
    return int(ask(method, path, *authorizations)[0]["status"])


@pytest.mark.parametrize(("method", "path"), sorted(SERVED))
def test_what_is_served_is_served_to_the_key_alone(activity: int, method: str, path: str) -> None:
    assert status(method, path, f"Bearer {KEY}") == 200
    assert status(method, path, f"bearer  {KEY}") == 200
    for wrong in (
        (),
        ("Bearer wrong",),
        (f"Bearer {KEY}x",),
        (f"Bearer {KEY[:-1]}",),
        ("Bearer ",),
        (KEY,),
        (f"Basic {KEY}",),
        (f"Bearer {KEY}", "Bearer wrong"),
    ):
        assert status(method, path, *wrong) == 401


@pytest.mark.parametrize("path", CONTROL)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_no_other_route_is_reached_with_the_key_or_without(activity: int, method: str, path: str) -> None:
    assert status(method, path) == 401
    assert status(method, path, f"Bearer {KEY}") == 404


def test_a_served_path_is_served_by_its_own_method_only(activity: int) -> None:
    assert status("DELETE", "/v1/models", f"Bearer {KEY}") == 404
    assert status("GET", "/v1/completions", f"Bearer {KEY}") == 404


def test_it_proves_to_have_the_key_without_sending_it(activity: int) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(CHALLENGE.encode(), b"7f")]}
    asyncio.run(Gate(behind)(scope, None, send))  # type: ignore[arg-type]
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 401
    assert headers[PROOF.encode()].decode() == proof(KEY.encode(), b"7f")
    assert proof(b"another", b"7f") != proof(KEY.encode(), b"7f") != proof(KEY.encode(), b"7e")
    assert PROOF.encode() not in dict(ask("GET", "/health")[0]["headers"])


def test_it_does_not_begin_with_an_empty_key(
    activity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("\n")
    with pytest.raises(RuntimeError, match="is empty"):
        Gate(behind)


def test_a_websocket_is_closed_whatever_it_brings(activity: int) -> None:
    sent = ask("", "/v1/realtime", f"Bearer {KEY}", kind="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_life_of_the_server_itself_passes(activity: int) -> None:
    assert ask("", "", kind="lifespan")[0]["status"] == 200


def test_each_answer_is_counted_from_its_begin_to_its_end(activity: int) -> None:
    def told() -> bytes:
        try:
            return os.read(activity, 100)
        except BlockingIOError:
            return b""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        assert told() == BEGIN
        raise ConnectionError("the client is gone")

    ask("POST", "/v1/completions", f"Bearer {KEY}")
    assert told() == BEGIN + END
    with pytest.raises(ConnectionError):
        ask("POST", "/v1/completions", f"Bearer {KEY}", app=fails)
    assert told() == END
    ask("GET", "/health", f"Bearer {KEY}")
    ask("POST", "/v1/completions", "Bearer wrong")
    ask("POST", "/pause", f"Bearer {KEY}")
    assert told() == b""
