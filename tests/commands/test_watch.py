"""watch: on a terminal of its own, and wherever else a person points its output."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from r1hpc import watch
from r1hpc.attempt.begin import write_needs
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.submission.chain.file import read_definition, save_definition
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.commands.commands import Supervised, as_text, wait_until
from tests.recorded import RecordedRun

_ENTER, _LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """`watch RUN` on a terminal of this size; what it has drawn so far."""

    def __init__(self, run: Path, columns: int, lines: int = 24, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        command = [sys.executable, "-m", "r1hpc.watch", str(run), "--every", "0.2"]
        known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**known, "TERM": "xterm", **environment},
            start_new_session=True,
        )
        os.close(slave)
        self.drawn = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while got := os.read(self._master, 65536):
                self.drawn += got
        except OSError:  # Linux says so where the other end is closed
            pass

    def wait(self) -> int:
        status = self.process.wait(30)
        self._reader.join(10)
        os.close(self._master)
        return status


@pytest.fixture
def at_work(supervised: Supervised) -> RecordedRun:
    made, _ = supervised
    return made


def finish(made: RecordedRun) -> None:
    made.steps(21, 40, startup_s=0)
    made.end("finished", committed=40)


def run_watch(argv: Sequence[str], **environment: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "r1hpc.watch", *argv]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, timeout=60, check=False
    )


def test_once_says_where_the_run_is(at_work: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(at_work.run.plan, {"num_steps": 40})
    text = as_text(watch, ["demo", "--once"], capsys)
    for words in (
        "demo: running",
        "50%",
        "step 20 of 40",
        "loss",
        "20 s left",
        "128",
        "node-hours",
        "used",
        "to come",
    ):
        assert words in text, text
    assert "\x1b" not in text
    assert re.search(r"  [\d,]+ used", text), (
        "hours of thousands need no decimals, small ones need more than two"
    )


def test_the_reward_stands_where_there_is_one(
    at_work: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    MetricWriter(at_work.run, 1).step(global_step=21, loss=0.0, reward=0.625, accuracy=0.5)
    text = as_text(watch, ["--once"], capsys)
    assert "0.6250" in text
    assert text.index("reward") < text.index("loss")


def test_of_a_stage_in_parts_the_finished_ones_are_counted(
    in_parts: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    text = as_text(watch, ["--once"], capsys)
    for words in ("asked: running", "  7%", "part 7 of 100", "23 min 15 s left"):
        assert words in text, text
    assert "step" not in text
    assert "\n\n\n" not in text, "nothing stands where curves would"
    in_parts.parts(7, 99)
    in_parts.end("finished", committed=100)
    text = as_text(watch, ["--once"], capsys)
    assert "100%" in text
    assert "part 100 of 100" in text


def test_of_gpus_the_newest_reading_is_shown(
    at_work: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    import time

    at_work.gpu_ticks(time.time() - 29, 30, node="n1", gpus=2)
    assert "31.0 GiB of 80.0 GiB" in as_text(watch, ["--once"], capsys)
    at_work.gpu_ticks(time.time() - 29, 30, node="n2", gpus=16)
    assert "all 16" in as_text(watch, ["--once"], capsys), "a row for each node"


def test_without_a_terminal_it_prints_one_picture_after_the_other(at_work: RecordedRun) -> None:
    command = [sys.executable, "-m", "r1hpc.watch", str(at_work.run.path), "--every", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "demo: running" in process.stdout.readline()
    finish(at_work)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "demo: finished" in rest
    assert "step 40 of 40" in rest
    assert "\x1b" not in rest


@pytest.mark.parametrize("columns", [40, 60, 132])
def test_on_a_terminal_it_is_redrawn_and_leaves_the_last_state(at_work: RecordedRun, columns: int) -> None:
    terminal = Terminal(at_work.run.path, columns)
    wait_until(lambda: b"20 of 40" in terminal.drawn, 30)
    finish(at_work)
    assert terminal.wait() == 0
    assert terminal.drawn.count(_ENTER) == terminal.drawn.count(_LEAVE) == 1
    assert b"\x1b[?25h" in terminal.drawn[terminal.drawn.index(_LEAVE) - 20 :], "the cursor is back"
    left = terminal.drawn.rpartition(_LEAVE)[2]
    assert b"finished" in left
    assert b"40 of 40" in left


def test_a_low_terminal_shows_one_curve_and_all_facts(at_work: RecordedRun) -> None:
    terminal = Terminal(at_work.run.path, 40, lines=12)
    wait_until(lambda: b"attempt" in terminal.drawn, 30)
    finish(at_work)
    assert terminal.wait() == 0
    screen, _, left = terminal.drawn.partition(_LEAVE)
    assert b"loss" in screen
    assert b"gradient norm" not in screen
    assert b"gradient norm" in left


def test_ctrl_c_ends_the_watching_and_not_the_run(at_work: RecordedRun) -> None:
    terminal = Terminal(at_work.run.path, 80)
    wait_until(lambda: _ENTER in terminal.drawn, 30)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 130
    assert terminal.drawn.count(_LEAVE) == 1
    assert b"left alone" in terminal.drawn
    assert b"Traceback" not in terminal.drawn


def test_a_dumb_terminal_and_one_without_unicode_are_served(at_work: RecordedRun) -> None:
    finish(at_work)
    dumb = Terminal(at_work.run.path, 80, TERM="dumb")
    assert dumb.wait() == 0
    assert b"\x1b" not in dumb.drawn
    done = run_watch([str(at_work.run.path), "--once"], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0
    done.stdout.decode("ascii")
    assert b"?" not in done.stdout


def test_a_closed_pipe_is_no_error(at_work: RecordedRun) -> None:
    command = [sys.executable, "-m", "r1hpc.watch", str(at_work.run.path), "--every", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_narrow_window_breaks_no_line(at_work: RecordedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("40", "58", "79"):
        done = run_watch([str(at_work.run.path), "--once"], COLUMNS=columns)
        assert max(len(line) for line in done.stdout.decode().splitlines()) <= int(columns)


def test_names_cannot_drive_the_terminal(at_work: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    at_work.end("crash", detail="[bold]a\x1b[31mb[/bold]")
    text = as_text(watch, ["--once"], capsys)
    assert "[bold]a" in text
    assert "\x1b" not in text


def test_a_period_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--every"):
        watch.main(["demo", "--every", "0"])


def test_of_a_chain_the_stage_at_work_is_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = ChainDir(root / "c")
    chain.path.mkdir(parents=True)
    file = root / "c.yaml"
    file.write_text("stages:\n  - name: first\n  - name: second\n")
    save_definition(read_definition(file, chain), chain)
    first, second = (RecordedRun(chain.stage(name).path) for name in ("first", "second"))
    for made in (first, second):
        made.submit("4711", "slurm")
    write_needs(second.run, ["first"])
    first.begin()
    first.steps(1, 20)
    text = as_text(watch, ["c", "--once"], capsys)
    assert "c: running, 0 of 2 stages finished" in text
    assert "c/first: running" in text
    first.steps(21, 40)
    first.end("finished", committed=40)
    second.begin()
    second.steps(1, 7)
    text = as_text(watch, ["c", "--once"], capsys)
    assert "c: running, 1 of 2 stages finished" in text
    assert "c/second: running" in text
    assert "step 7 of 40" in text
    second.steps(8, 40)
    second.end("finished", committed=40)
    assert watch.main(["c", "--every", "0.2"]) == 0
    assert "c: finished, 2 of 2 stages finished" in capsys.readouterr().out
