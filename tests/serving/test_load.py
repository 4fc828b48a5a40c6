"""A load test of a real HTTP server of known capacity (small_server.py): what it finds, and that it ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.serving.loadtest.load import Distribution, Level, failed_below, saturation, slope_per_hour
from r1hpc.serving.loadtest.stream import Answer
from r1hpc.slurm.rank_env import choose_port
from tests.runs import CHECKOUT, run_environment, wait_until
from tests.serving.clients import SMALL_SERVER, ask

KEY = "the-key-of-the-small-server"
SHORT = ["--drain", "20", "--max-tokens", "6", "--prompt-tokens", "8", "--json"]


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
        words = ["--host", "127.0.0.1", "--port", str(port), "--middleware", "r1hpc.serving.gate.Gate"]
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


def loaded(server: Small, out: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the JSON object, stderr) of a load test."""
    where = ["--key-file", str(server.key_file), "--out", str(out)]
    done = run_loadtest(server.url, *where, *SHORT, *words)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.soak  # its bounds are of time
def test_the_planted_capacity_and_times_are_found(small: Start, tmp_path: Path) -> None:
    """2 slots, each 300 ms to the first and 40 ms to each of 5 more tokens: 4 requests/s.

    Few, so that a machine that is busy with other things can do it too.
    """
    server = small("slots=2 first_s=0.3 token_s=0.04")
    words = ["--seconds", "5", "--rates", "0.5,0.8,2", "--soak", "0.07"]
    status, found, said = loaded(server, tmp_path / "out", *words)
    assert status == 0, said
    assert found["good"]
    assert found["saturation"]["requests_per_s"] == pytest.approx(4, rel=0.13)
    assert found["saturation"]["tokens_per_s"] == pytest.approx(6 * found["saturation"]["requests_per_s"])
    levels = found["levels"]
    assert [each["clients"] for each in levels[:3]] == [1, 2, 4]
    assert [each["kind"] for each in levels[-4:]] == ["open"] * 3 + ["soak"]
    alone = levels[0]
    assert 0.298 < alone["ttft_s"]["p50"] < 1.3 * 0.3
    assert alone["ttft_s"]["p95"] >= alone["ttft_s"]["p50"]
    assert 0.7 * 0.04 < alone["inter_token_s"]["p50"] < 1.3 * 0.04
    assert alone["inter_token_s"]["count"] == 5 * alone["finished"]
    assert 0.497 < alone["latency_s"]["p50"] < 1.3 * 0.5
    assert alone["prompt_tokens"] == 8 * alone["finished"]
    over = levels[-2]
    assert over["finished_per_s"] == pytest.approx(4, rel=0.13)
    assert not over["keeps_up"]
    assert over["ttft_s"]["p50"] > 1.5 * alone["ttft_s"]["p50"], "who waits for a slot has waited"
    soak = levels[-1]
    assert len(soak["memory_bytes"]) >= 3
    assert 5e6 < soak["memory_bytes"][0][1] < 1e9
    assert found["memory"].startswith("process group")
    assert soak["memory_slope_bytes_per_hour"] is not None
    name = Path(found["file"])
    assert json.loads(name.read_text())["levels"] == levels
    assert KEY not in name.read_text()
    assert name.stat().st_mode & 0o77 == 0


def test_failures_are_counted_by_kind_and_told_by_the_exit_status(small: Start, tmp_path: Path) -> None:
    server = small("slots=4 first_s=0.02 fail_every=10")
    words = ["--seconds", "2", "--levels", "4", "--rates", "0.5"]
    status, found, _ = loaded(server, tmp_path / "out", *words)
    assert status == 1
    assert found["saturation"] is None
    closed, opened = found["levels"]
    assert closed["failed"]["HTTP 500"] == pytest.approx(closed["begun"] / 10, abs=1)
    assert closed["said"] == {"HTTP 500": "planted"}
    assert closed["finished"] + closed["failed"]["HTTP 500"] == closed["begun"]
    assert opened["failed"].keys() == {"HTTP 500"}
    assert found["failed_below_saturation"] == ["4 clients", opened["name"]]


def test_a_stream_that_breaks_off_is_a_failure(small: Start, tmp_path: Path) -> None:
    server = small("slots=4 first_s=0.02 break_every=5")
    status, found, _ = loaded(server, tmp_path / "out", "--seconds", "1", "--levels", "2", "--rates", "none")
    assert status == 1
    (level,) = found["levels"]
    assert level["failed"].keys() == {"connection broken"}


def test_it_ends_though_the_server_hangs(small: Start, tmp_path: Path) -> None:
    server = small("slots=4 first_s=0.02 hang_after=8")
    words = ["--seconds", "1", "--drain", "2", "--levels", "4,8,16"]
    status, found, _ = loaded(server, tmp_path / "out", *words)
    assert status == 1
    assert sum(each["finished"] for each in found["levels"]) == 7, "one of its eight was before the levels"
    last = found["levels"][-1]
    assert (last["finished"], last["unfinished"]) == (0, last["clients"])
    assert found["ended_early"] == "the server takes requests, and has finished none"


def test_it_ends_though_the_server_stands_still_altogether(small: Start, tmp_path: Path) -> None:
    server = small("slots=4 first_s=0.02")
    running = _begun(server, tmp_path / "out", "--seconds", "1", "--drain", "2", "--levels", "2" + ",4" * 12)
    _first_level(running)
    os.killpg(server.process.pid, signal.SIGSTOP)
    out, _ = running.communicate(timeout=100)
    assert running.returncode == 1
    assert json.loads(out)["ended_early"]


def test_a_server_that_is_killed_ends_it_with_a_sentence(small: Start, tmp_path: Path) -> None:
    server = small("slots=4 first_s=0.02")
    running = _begun(server, tmp_path / "out", "--seconds", "20", "--levels", "4")
    wait_until("load", lambda: _connections(server.url) >= 4, 60)
    os.killpg(server.process.pid, signal.SIGKILL)
    out, _ = running.communicate(timeout=100)
    assert running.returncode == 1
    found = json.loads(out)
    assert found["ended_early"] == "the server is gone: it takes no connections any more"
    (level,) = found["levels"]
    assert level["server_gone"]
    assert level["failed"]["no connection"] >= 5


def _begun(server: Small, out: Path, *words: str) -> "subprocess.Popen[str]":
    where = ["--key-file", str(server.key_file), "--out", str(out), "--rates", "none"]
    command = [sys.executable, "-m", "r1hpc.loadtest", server.url, *where, *SHORT, *words]
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=run_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _first_level(running: "subprocess.Popen[str]") -> None:
    assert running.stderr is not None
    assert "2 clients" in running.stderr.readline()


def _connections(url: str) -> int:
    """Established ones at the server's end (proc_net_tcp.rst of the kernel)."""
    port = f":{int(url.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


def test_chat_and_prompts_of_a_file_are_asked_in_turn(small: Start, tmp_path: Path) -> None:
    server = small("slots=4 first_s=0.02")
    lines = [{"messages": [{"role": "user", "content": "17 + 25"}], "id": 1}, {"prompt": "one two three"}]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(each)}\n\n" for each in lines))
    words = ["--seconds", "1", "--levels", "1", "--rates", "none", "--prompts", str(tmp_path / "p.jsonl")]
    status, found, said = loaded(server, tmp_path / "out", *words)
    assert status == 0, said
    assert found["prompts"] == "2 prompts of p.jsonl, in turn"
    (level,) = found["levels"]
    assert level["tokens"] == 6 * level["finished"] == level["token_events"], "the turn of chat is no token"


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
    told = ["--unproven", "--seconds", "1", "--levels", "1", "--rates", "none"]
    assert loaded(stranger, tmp_path / "out", *told)[0] == 0


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
        (["http://h:1", "--rates", "0.5,nan"], "--rates nan: give 0.01 to 10"),
        (["http://h:1", "--seconds", "-1"], "--seconds -1: give 1 to"),
        (["http://h:1", "--soak", "inf"], "--soak inf: give 0 to 10080"),
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


def test_percentiles_are_true_to_half_a_percent() -> None:
    times = Distribution()
    for i in range(1, 1001):
        times.add(i / 1000)
    for percent in (50, 95, 99):
        assert times.percentile(percent) == pytest.approx(percent / 100, rel=0.006)
    assert times.as_json()["mean"] == pytest.approx(0.5005)
    assert Distribution().percentile(50) is None


def level(kind: str, asked: float, finished: int, last_end: float, **counts: Any) -> Level:
    """Of ten seconds, with answers of 0.1 s."""
    made = Level(kind, asked, 10.0, begun=finished + counts.pop("unfinished", 0))
    for i in range(finished):
        due = (last_end - 0.1) * (i + 1) / finished
        made.hear(Answer(due, ended=due + 0.1, first_s=0.05, num_tokens=2), due + 0.1)
    for _ in range(counts.pop("failed", 0)):
        made.begun += 1
        made.hear(Answer(1.0, failure="HTTP 500"), 1.1)
    return made


def test_saturation_is_the_most_that_keeps_up_without_a_failure() -> None:
    closed = [level("closed", 1, 100, 10.1), level("closed", 4, 380, 10.1)]
    assert saturation(closed) is closed[1]
    keeps, behind = level("open", 40, 400, 10.1), level("open", 60, 600, 15.0)
    assert (keeps.keeps_up, behind.keeps_up) == (True, False)
    assert behind.finished_per_s == pytest.approx(600 / 14.9, rel=0.01)
    fails, stuck = level("open", 50, 490, 10.1, failed=10), level("open", 45, 440, 10.1, unfinished=10)
    everything = [*closed, keeps, behind, fails, stuck]
    assert saturation(everything) is keeps
    assert failed_below(everything, keeps) == [], "what is asked above saturation may fail"
    early, many = level("open", 20, 190, 10.1, failed=10), level("closed", 8, 300, 10.1, failed=1)
    assert failed_below([*everything, early, many], keeps) == [early]
    assert failed_below([level("soak", 28, 280, 10.1), fails], None) == [fails]


def test_the_slope_leaves_out_the_begin_in_which_caches_fill() -> None:
    grows = [(float(t), 1000.0 + 2 * t) for t in range(0, 3600, 10)]
    assert slope_per_hour(grows) == pytest.approx(7200)
    assert slope_per_hour([(0.0, 0.0), *grows[40:]]) == pytest.approx(7200)
    assert slope_per_hour(grows[:2]) is None
