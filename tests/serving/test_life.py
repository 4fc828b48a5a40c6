"""The life of a server, with a small one in the place of vLLM (small_server.py)."""

import os
import signal
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from r1hpc.attempt.workload import Outcome
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import load
from r1hpc.serving import life
from r1hpc.serving.address import Address, Place, make_key, read_address
from r1hpc.serving.life import TIME_LIMIT, Life, ServerError, _Health
from r1hpc.serving.process import Server, command_of, environment_of
from r1hpc.slurm.rank_env import choose_port
from r1hpc.telemetry.records.metrics import last_steps
from tests.runs import CHECKOUT, wait_until
from tests.serving.clients import SMALL_SERVER, ask, key_of


class Served:
    """A server whose life is lived by a thread of this process."""

    def __init__(self, root: Path, *settings: str, python: str = SMALL_SERVER, **environ: str) -> None:
        self.run = RunDir(root / "s")
        self.run.create()
        words = ["stage=serve", "model.path=/models/m", "resources.gpus_per_node=0", *settings]
        config = load(None, [f"serve.python={python}", *words])
        with choose_port() as listener:
            place = Place("127.0.0.1", listener.getsockname()[1], "here")
        self.url, self.stop, self.left = place.url, "", None
        self.life = Life(
            self.run,
            config,
            attempt=1,
            place=place,
            model_name="m",
            stop_reason=lambda: self.stop,
            seconds_left=lambda: self.left,
            lead_s=60,
            beat=lambda phase: None,
        )
        self._command = command_of(config, [], place, "m")
        self._environment = environment_of({**os.environ, **environ}, CHECKOUT, make_key(self.run))
        self.ended: Outcome | Exception | None = None
        self._thread = threading.Thread(target=self._live)

    left: float | None

    def _live(self) -> None:
        try:
            self.ended = self.life.live(self._command, self._environment)
        except Exception as error:
            self.ended = error

    def begin(self) -> "Served":
        self._thread.start()
        return self

    def address(self) -> Address:
        """Once it answers."""
        wait_until("address", lambda: read_address(self.run) is not None or self.ended is not None, 30)
        address = read_address(self.run)
        assert address is not None, self.ended
        return address

    def wait_end(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert read_address(self.run) is None, "an address of a server that is gone"
        return self.ended

    def end(self) -> Outcome:
        self.stop = "SIGTERM"
        ended = self.wait_end()
        assert isinstance(ended, Outcome), ended
        return ended


@pytest.fixture
def serve(tmp_path: Path) -> Any:
    made: list[Served] = []

    def make(*settings: str, **options: Any) -> Served:
        made.append(Served(tmp_path, *settings, **options))
        return made[-1]

    yield make
    for each in made:
        each.stop = "the test is over"
        if each._thread.ident is not None:
            each._thread.join(60)


Serve = Callable[..., Served]


def test_it_answers_a_hundred_requests_to_its_key_and_none_without(serve: Serve) -> None:
    server = serve().begin()
    url, key = server.address().place.url, key_of(server.run)
    assert server.run.server_key.stat().st_mode & 0o777 == 0o600
    assert server.run.server_address.stat().st_mode & 0o777 == 0o600
    assert [ask(url, "/v1/completions", key, {}) for _ in range(100)] == [200] * 100
    for path in ("/health", "/v1/models", "/metrics", "/pause", "/collective_rpc"):
        assert ask(url, path, None) == 401
        assert ask(url, path, "wrong") == 401
    for path in ("/pause", "/collective_rpc", "/load"):
        assert ask(url, path, key) == ask(url, path, key, {}) == 404
    assert server.end() == Outcome(False, reason="SIGTERM")
    ready, spell = last_steps(server.run, 9)
    assert (ready.step_time_s, ready.number("requests")) == (0, 0)
    assert spell.number("requests") == 100
    assert spell.step_time_s


def test_what_it_has_answered_is_on_record_before_it_has_ended(serve: Serve) -> None:
    server = serve(SMALL_SERVER="stubborn").begin()
    assert ask(server.address().place.url, "/v1/completions", key_of(server.run), {}) == 200
    server.stop = "SIGTERM"
    wait_until("its spell", lambda: last_steps(server.run, 1)[-1].number("requests") == 1, 60)
    assert server.ended is None
    assert server.end() == Outcome(False, reason="SIGTERM")


def test_who_was_suspended_has_not_been_silent() -> None:
    health = _Health(cast(Server, SimpleNamespace(ask=lambda path, key: None)), "key")
    health.asked = health.answered = time.monotonic() - 1000
    health.look()
    health.asked, health.answered = time.monotonic() - 11, time.monotonic() - 121
    with pytest.raises(ServerError, match="has not answered for 121 s"):
        health.look()


def test_it_ends_when_nobody_has_asked_for_long_and_not_while_it_answers(serve: Serve) -> None:
    server = serve("serve.idle_minutes=0.1").begin()
    url, key = server.address().place.url, key_of(server.run)
    assert ask(url, "/v1/completions", key, {"delay_s": 8}) == 200  # longer than it may be idle
    ended = server.wait_end()
    assert ended.finished
    assert "no request" in ended.reason


def test_asking_for_its_health_or_with_a_wrong_key_does_not_keep_it_alive(serve: Serve) -> None:
    server = serve("serve.idle_minutes=0.15").begin()
    url, key = server.address().place.url, key_of(server.run)
    while server.ended is None:
        try:
            ask(url, "/health", key)
            ask(url, "/v1/completions", "wrong", {})
        except (OSError, HTTPException):  # it is gone, perhaps in the middle of an answer
            break
    assert server.wait_end().finished


def test_the_time_limit_ends_it_for_good_and_a_signal_before_that_does_not(serve: Serve) -> None:
    server = serve()
    server.left = 61.0
    server.begin().address()
    server.left = 59.0
    assert server.wait_end() == Outcome(True, reason=TIME_LIMIT)


@pytest.mark.parametrize(("left", "is_finished"), [(110.0, True), (900.0, False), (None, False)])
def test_slurms_warning_is_of_the_time_limit_only_near_it(
    serve: Serve, left: float | None, is_finished: bool
) -> None:
    """It may come up to a minute before it is due."""
    server = serve()
    server.left, server.stop = left, "SIGUSR2"
    assert server.begin().wait_end().finished is is_finished


def test_one_that_dies_says_how(serve: Serve) -> None:
    ended = serve(SMALL_SERVER="dies").begin().wait_end()
    assert isinstance(ended, ServerError)
    assert "exit status 3" in str(ended)


def test_one_that_is_killed_while_it_serves_says_so(serve: Serve) -> None:
    server = serve().begin()
    server.address()
    (pid,) = pids_of(server.url)
    os.kill(pid, signal.SIGKILL)
    ended = server.wait_end()
    assert isinstance(ended, ServerError)
    assert "signal 9" in str(ended)


def test_one_that_slurm_ends_together_with_its_rank_has_not_failed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm signals every process of a step, and the server may be the quicker one."""
    monkeypatch.setattr(life, "_SIGNAL_PATIENCE_S", 60.0)
    server = serve().begin()
    server.address()
    (pid,) = pids_of(server.url)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert server.ended is None
    assert server.end() == Outcome(False, reason="SIGTERM")


def test_one_that_answers_without_the_key_is_ended(serve: Serve) -> None:
    ended = serve(SMALL_SERVER="open").begin().wait_end()
    assert isinstance(ended, ServerError)
    assert "without its key" in str(ended)


def test_the_key_is_not_sent_to_one_that_does_not_have_it(serve: Serve) -> None:
    """Another user of the node, who listens on the port ahead of the server."""
    ended = serve(SMALL_SERVER="stranger").begin().wait_end()
    assert isinstance(ended, ServerError)
    assert "does not have the server's key" in str(ended)


def test_one_that_never_answers_is_given_up(serve: Serve) -> None:
    ended = serve("serve.start_minutes=0.02", SMALL_SERVER="silent").begin().wait_end()
    assert isinstance(ended, ServerError)
    assert "serve.start_minutes=0.02" in str(ended)


def test_an_interpreter_without_vllm_is_named(serve: Serve) -> None:
    """The real module that starts vLLM, on an interpreter that has none."""
    ended = serve(python="/usr/bin/env python3 -S").begin().wait_end()
    assert isinstance(ended, UsageError)
    assert "serve.python" in str(ended)


def test_an_interpreter_that_is_not_on_the_node_is_named(serve: Serve) -> None:
    ended = serve(python="/nowhere/python").begin().wait_end()
    assert isinstance(ended, UsageError)
    assert "/nowhere/python" in str(ended)


def pids_of(url: str) -> list[int]:
    """Processes that were started with this server's port."""
    port = url.rpartition(":")[2].encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
        except OSError:
            continue
        if port in words and b"--middleware" in words:
            found.append(int(process.name))
    return found
