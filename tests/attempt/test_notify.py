"""The message at the end of a run: sent by the `end` step, bounded in time, never the run's failure."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from r1hpc.attempt import notify
from r1hpc.attempt.begin import begin
from r1hpc.attempt.end import Next, end
from r1hpc.attempt.may_begin import MustNotGoOnError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import LimitsConfig, NotifyConfig
from tests.recorded import RecordedRun


class _Hook(BaseHTTPRequestHandler):
    got: ClassVar[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        self.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A webhook."""
    _Hook.got.clear()
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    server.server_close()


def ended(folder: Path, limits: LimitsConfig, **given: str) -> tuple[RecordedRun, Next]:
    """An attempt that crashed and was judged."""
    made = RecordedRun(folder / "demo")
    config = replace(load.read(made.run.config), notify=NotifyConfig(**given), limits=limits)
    load.save(config, made.run.config)
    made.submit("local-1")
    made.begin()
    made.steps(1, 5)
    return made, end(made.run, 1, 1, diagnose=False).next


def test_a_failure_for_good_is_told(url: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    made, follows = ended(tmp_path, LimitsConfig(max_crashes=0), url=url, command=f"cat > {told}")
    assert follows is Next.over
    (message,) = _Hook.got
    assert (message["run"], message["state"], message["run_dir"]) == ("demo", "failed", str(made.run.path))
    assert message["text"].startswith("demo: failed (attempt 1: ")
    assert told.read_text() == message["text"] + "\n"


def test_an_attempt_after_which_the_run_goes_on_is_not_told(url: str, tmp_path: Path) -> None:
    assert ended(tmp_path, LimitsConfig(max_crashes=3), url=url)[1] is Next.requeue
    assert _Hook.got == []


def test_a_hook_that_never_answers_does_not_hold_the_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "_LONGEST_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        secret = f"http://127.0.0.1:{deaf.getsockname()[1]}/s3cret"
        began = time.monotonic()
        command = ": t0ken; exit 7"
        made, follows = ended(tmp_path, LimitsConfig(max_crashes=0), url=secret, command=command)
        assert time.monotonic() - began < 5
    assert follows is Next.over
    said = capsys.readouterr().err
    assert "notify.command failed: status 7" in said
    assert "t0ken" not in said
    assert "s3cret" not in made.run.attempts.read_text()


def test_a_url_that_is_none_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(tmp_path, LimitsConfig(max_crashes=0), url="http://127.0.0.1/s3cret blank")
    said = capsys.readouterr().err
    assert "notify.url failed: InvalidURL\n" in said
    assert "s3cret" not in said


def refused(folder: Path, mode: int, told: Path) -> None:
    """A run that must not begin: it has others' rights, or a recipe that is not there."""
    run = RunDir(folder / "demo")
    run.create()
    words = ["stage=pretrain", "resources.gpus_per_node=0", f"data.recipe={folder}/none.yaml"]
    load.save(load.load(None, [*words, f"notify.command='echo 7; cat > {told}'"]), run.config)
    run.path.chmod(mode)
    with pytest.raises(MustNotGoOnError):
        begin(run, "local", "local-1", ("n1",), 1)


def test_a_run_that_does_not_begin_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path, 0o700, tmp_path / "told")
    assert (tmp_path / "told").read_text().startswith("demo: failed (")
    assert capfd.readouterr().out == "", "the job script reads the attempt's number there"


def test_no_command_of_a_folder_that_others_may_write_is_run(tmp_path: Path) -> None:
    refused(tmp_path, 0o770, tmp_path / "told")
    assert not (tmp_path / "told").exists()
