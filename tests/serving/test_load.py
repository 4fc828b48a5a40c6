"""A load test of a real HTTP server of known capacity (small_server.py): what it finds, and that it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.serving import loadtest
from r1hpc.slurm.rank_env import choose_port
from tests.runs import CHECKOUT, run_environment, wait_until
from tests.serving.clients import SMALL_SERVER, ask

KEY = "the-key-of-the-small-server"
SHORT = ["--max-tokens", "6", "--prompt-tokens", "8", "--json"]


class Small:
    """A small server of its own process, behind the gate."""

    def __init__(self, folder: Path, stream: str, key: str = KEY, **environ: str) -> None:
        self.key_file = folder / "key"
        self.key_file.write_text(f"{key}\n")
        self.key_file.chmod(0o600)
        with choose_port() as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **run_environment(),
            "PYTHONPATH": str(CHECKOUT),
            "STREAM": stream,
            "R1HPC_SERVE_KEY_FILE": str(self.key_file),
            "R1HPC_SERVE_ACTIVITY_FD": str(null := os.open(os.devnull, os.O_WRONLY)),
            **environ,
        }
        words = ["--host", "127.0.0.1", "--port", str(port), "--middleware", "r1hpc.serving.vllm_server.Gate"]
        command = [*SMALL_SERVER.split(), *words]
        self.process = subprocess.Popen(command, env=environment, pass_fds=(null,), start_new_session=True)
        os.close(null)
        wait_until("answer", self._answers, 30)

    def _answers(self) -> bool:
        try:
            return ask(self.url, "/health", None) in (200, 401)
        except OSError:
            return False

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Small]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Start]:
    begun: list[Small] = []

    def start(stream: str, **options: Any) -> Small:
        begun.append(Small(tmp_path, stream, **options))
        return begun[-1]

    yield start
    for each in begun:
        each.end()


def run_loadtest(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "r1hpc.loadtest", *words]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=run_environment(), capture_output=True, text=True, timeout=150, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert KEY not in done.stdout + done.stderr
    return done


def loaded(server: Small, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the JSON object, stderr) of a load test."""
    done = run_loadtest(server.url, "--key-file", str(server.key_file), *SHORT, *words)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def levels(found: dict[str, Any]) -> list[dict[str, Any]]:
    (server,) = found["servers"]
    measured: list[dict[str, Any]] = server["levels"]
    return measured


def test_the_planted_capacity_and_times_are_found(small: Start) -> None:
    """2 slots, each 300 ms to the first and 40 ms to each of 5 more tokens: at most 4 requests/s."""
    status, found, said = loaded(
        small("slots=2 first_s=0.3 token_s=0.04"), "--seconds", "3", "--levels", "1,4"
    )
    assert status == 0, said
    alone, many = levels(found)
    assert 0.298 < alone["ttft_s"]["p50"] <= alone["ttft_s"]["p95"]
    assert alone["latency_s"]["p50"] > alone["ttft_s"]["p50"] + 0.19
    assert many["latency_s"]["p50"] > 1.5 * alone["latency_s"]["p50"], "who waits for a slot has waited"
    assert 2.5 < many["requests_per_s"] <= 4.1
    assert many["tokens_per_s"] == pytest.approx(6 * many["requests_per_s"])


def test_clients_double_until_throughput_stops_growing(small: Start) -> None:
    _, found, said = loaded(small("slots=2 first_s=0.2"), "--seconds", "2")
    counts = [each["clients"] for each in levels(found)]
    assert counts in ([1, 2, 4], [1, 2, 4, 8]), said


def test_two_servers_are_compared_under_the_same_load(small: Start) -> None:
    slow, fast = small("slots=4 first_s=0.4"), small("slots=4 first_s=0.1")
    words = ["--key-file", str(slow.key_file), "--max-tokens", "4", "--seconds", "2", "--levels", "2,1"]
    done = run_loadtest(slow.url, fast.url, *words)
    assert done.returncode == 0, done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith(f"{fast.url} beside {slow.url} with 2 clients: ")
    faster, p50, p95 = map(float, re.findall(r"([0-9.]+) x", verdict))
    assert faster > 1.5
    assert p50 < 0.7
    assert p95 < 1


def test_failures_are_counted_by_kind_and_told_by_the_exit_status(small: Start) -> None:
    status, found, _ = loaded(small("slots=4 first_s=0.02 fail_every=10"), "--seconds", "2", "--levels", "2")
    assert status == 1
    (level,) = levels(found)
    total = level["finished"] + level["failed"]["HTTP 500"]
    assert level["failed"]["HTTP 500"] == pytest.approx(total / 10, abs=1)
    assert level["details"] == {"HTTP 500": "planted"}


def test_a_stream_that_breaks_off_is_a_failure(small: Start) -> None:
    status, found, _ = loaded(small("slots=4 first_s=0.02 break_every=5"), "--seconds", "1", "--levels", "2")
    assert status == 1
    assert levels(found)[0]["failed"].keys() == {"connection broken"}


def test_it_ends_though_the_server_hangs(small: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadtest, "_TIMEOUT_S", 1.0)
    server = small("slots=4 first_s=0.02 hang_after=8")
    target = loadtest.Target("s", server.url, "little", KEY)
    found = list(loadtest.measure(target, loadtest.Prompts(8, 4), (2, 4, 8), 1.0))
    assert [level["finished"] for level in found] == [8, 0]
    assert found[1]["failed"].keys() == {"no answer in time"}


def test_a_server_that_is_killed_ends_it_with_a_sentence(small: Start) -> None:
    server = small("slots=4 first_s=0.02")
    words = [server.url, "--key-file", str(server.key_file), "--seconds", "2", "--levels", "2" + ",2" * 20]
    running = subprocess.Popen(
        [sys.executable, "-m", "r1hpc.loadtest", *words],
        cwd=CHECKOUT,
        env=run_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    assert "2 clients" in running.stderr.readline()
    os.killpg(server.process.pid, signal.SIGKILL)
    assert running.wait(60) == 1
    assert "Traceback" not in running.stderr.read()


def test_chat_and_prompts_of_a_file_are_asked_in_turn(small: Start, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": "17 + 25"}], "id": 1}, {"prompt": "one two three"}]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(each)}\n\n" for each in lines))
    words = ["--seconds", "1", "--levels", "1", "--prompts", str(tmp_path / "p.jsonl")]
    status, found, said = loaded(small("slots=4 first_s=0.02"), *words)
    assert status == 0, said
    (level,) = levels(found)
    assert level["tokens_per_s"] == pytest.approx(6 * level["requests_per_s"])


def test_the_key_is_not_sent_to_who_does_not_have_it(small: Start, tmp_path: Path) -> None:
    server = small("slots=4")
    wrong = tmp_path / "wrong"
    wrong.write_text("another\n")
    refused = run_loadtest(server.url, "--key-file", str(wrong))
    assert refused.returncode == 1
    assert "does not have this key" in refused.stderr
    without = run_loadtest(server.url)
    assert without.returncode == 1
    assert "wants a key (HTTP 401): name its file, --key-file FILE" in without.stderr
    stranger = small("slots=4", SMALL_SERVER="stranger")
    kept = run_loadtest(stranger.url, "--key-file", str(stranger.key_file))
    assert kept.returncode == 1
    assert "--unproven" in kept.stderr
    assert loaded(stranger, "--unproven", "--seconds", "1", "--levels", "1")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["http://127.0.0.1:1"], "nobody answers at http://127.0.0.1:1"),
        (["ftp://host"], "give http://HOST:PORT"),
        (["http://host:99999"], "give http://HOST:PORT"),
        (["nowhere"], "no run at nowhere"),
        (["nowhere", "--key-file", "f"], "--key-file is of a URL"),
        (["http://h:1", "--unproven"], "--key-file FILE"),
        (["http://h:1", "--key-file", "/nowhere/key"], "No such file"),
        (["http://h:1", "--key-file", "/dev/null"], "is a key, and this is none"),
        (["http://h:1", "--levels", "0"], "--levels 0: give 1 to 1024"),
        (["http://h:1", "--levels", "a"], "give whole numbers"),
        (["http://h:1", "--seconds", "-1"], "--seconds -1: give 1 to"),
        (["http://h:1", "--max-tokens", "0"], "--max-tokens 0: give 1"),
        (["http://h:1", "--prompts", "/nowhere/p.jsonl"], "No such file"),
        (["http://h:1", "--prompts", "README.md"], 'README.md, line 1: wants an object with either "prompt"'),
        (["http://h:1", "--secs", "3"], "unknown argument"),
    ],
)
def test_what_makes_no_test_is_one_sentence(words: list[str], said: str) -> None:
    done = run_loadtest(*words)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def _answers(*raw: bytes) -> str:
    """Serve these answers, one a connection, and close each; return the URL."""
    listener = choose_port()
    listener.listen()

    def serve() -> None:
        for each in raw:
            visitor, _ = listener.accept()
            with visitor:
                visitor.sendall(each)
                visitor.shutdown(socket.SHUT_WR)
                while visitor.recv(65536):  # closed with unread bytes, the connection would be reset
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_answer_without_a_token_and_one_that_breaks_off_are_failures() -> None:
    stream = b'data: {"choices": [{"finish_reason": "stop"}], "usage": {"completion_tokens": null}}\n\n'
    url = _answers(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + stream,
        b"HTTP/1.1 500 Oh\r\nContent-Length: 100\r\n\r\nshort",
    )
    target = loadtest.Target("x", url, "m")
    assert loadtest.ask(target, "/v1/completions", {}).failure == "no token"
    assert loadtest.ask(target, "/v1/completions", {}).failure == "HTTP 500"
