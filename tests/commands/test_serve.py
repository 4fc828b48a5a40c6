"""r1hpc.serve on this machine, with a small server in the place of vLLM (tests/serving/small_server.py).

That it holds on Slurm: tests/test_serve_slurm.py; with vLLM itself: tests/serving/test_vllm_server.py.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1hpc import api, budget, cancel, diagnose, estimate, report, serve, status
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.commands.commands import as_json
from tests.runs import CHECKOUT, run_environment, wait_attempt, wait_over, wait_until
from tests.serving.clients import SMALL_SERVER, ask, key_of, make_model
from tests.serving.test_life import pids_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "little")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[list[str]]:
    """Words that keep a server on this machine; it is ended with the test."""
    words = [
        "--executor",
        "local",
        "--gpus",
        "0",
        "--python",
        SMALL_SERVER,
        "--run-root",
        str(tmp_path / "r"),
    ]
    yield words
    for run in (tmp_path / "r").glob("*/"):
        run.joinpath("STOP").touch()
        wait_over(RunDir(run), 60)


def run_serve(*words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "r1hpc.serve", *words]
    environment = run_environment({**os.environ, **(env or {})})
    return subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def served(*words: str) -> tuple[RunDir, str]:
    """(run, url) of a server that was started and answers."""
    done = run_serve(*words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    return RunDir(answer["run_dir"]), answer["url"]


def test_a_folder_is_served_until_it_is_idle_and_its_hours_are_on_record(
    model: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_serve(str(model), *here, "--run-name", "s", "--idle", "0.3")
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(Path(here[-1]) / "s")
    url = f"http://127.0.0.1:{json.loads(run.server_address.read_text())['place']['port']}"
    assert f"little answers at {url}/v1" in done.stdout
    assert "ssh -N -L" in done.stdout
    assert key_of(run) not in done.stdout + done.stderr, "the key itself is never printed"
    assert "starting on" in done.stdout
    shown = as_json(status, [str(run.path)], capsys)
    assert (shown["state"], shown["url"], shown["requests"]) == ("running", url, 0)
    assert [ask(url, "/v1/completions", key_of(run), {}) for _ in range(100)] == [200] * 100
    (attempt,) = wait_over(run)
    assert attempt.cause is Cause.finished
    assert "no request" in attempt.detail
    shown = as_json(status, [str(run.path)], capsys)
    assert (shown["state"], shown["requests"], shown["url"]) == ("finished", 100, None)
    (hours,) = as_json(report, [str(run.path)], capsys)["runs"]
    assert hours["attempts"][0]["time"]["useful_s"] > 0
    assert hours["attempts"][0]["time"]["lost_s"] == 0
    assert report.main([str(run.path)]) == 0
    assert "idle, no request" in capsys.readouterr().out
    assert report.main([str(run.path), "--format", "html", "--out", str(run.path / "page.html")]) == 0
    with pytest.raises(UsageError, match=r"is a server.*r1hpc\.status"):
        diagnose.main([str(run.path)])
    log = (run.logs / "local.out").read_text()
    assert "diagnosis" not in log
    assert f"{run.run_id}: attempt 1 begins" in log


def test_asked_for_again_it_tells_its_address_and_after_its_end_why_it_is_gone(
    model: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, url = served(str(model), *here)
    where = ["--run-root", here[-1], "--json"]
    assert as_json(serve, [run.run_id, *where[:2]], capsys)["url"] == url
    assert cancel.main([str(run.path)]) == 0
    wait_over(run)
    assert not pids_of(url), "the server has outlived its rank"
    done = run_serve(run.run_id, *where)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cancelled" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_dies_is_reported_with_the_last_lines_of_its_log(model: Path, here: list[str]) -> None:
    done = run_serve(str(model), *here, "cluster.environment.SMALL_SERVER=dies", "limits.max_crashes=0")
    assert done.returncode == 1
    assert "the server ended by itself, with exit status 3" in done.stderr
    assert "RuntimeError: the small server cannot load its weights" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_preempted_server_comes_back_with_its_key_and_its_count(model: Path, here: list[str]) -> None:
    run, url = served(str(model), *here)
    key = key_of(run)
    assert ask(url, "/v1/completions", key, {}) == 200
    job = read_situation(run).job
    assert job is not None
    assert job.pid is not None
    os.kill(job.pid, signal.SIGUSR2)
    wait_attempt(run, 2)
    again, new_url = served(run.run_id, "--run-root", here[-1])
    assert again.path == run.path
    assert ask(new_url, "/v1/completions", key, {}) == 200
    run.stop.touch()
    first, second = wait_over(run)
    assert (first.cause, second.cause) == (Cause.preempted, Cause.stopped)
    assert second.resumed_from == first.last_committed_step
    last = run.train_metrics.read_text().splitlines()[-1]
    assert json.loads(last)["requests"] == 2


def test_a_killed_rank_takes_its_server_along_and_one_crash_is_forgiven(model: Path, here: list[str]) -> None:
    run, url = served(str(model), *here)
    (server,) = pids_of(url)
    os.kill(server, signal.SIGKILL)
    wait_attempt(run, 2)
    assert read_history(run).attempts[0].cause is Cause.crash
    wait_until("new address", lambda: run.server_address.exists(), 60, run)
    assert read_situation(run).state is State.running


def test_the_local_time_limit_ends_it(model: Path, here: list[str]) -> None:
    run, _ = served(str(model), *here, "--time", "00:00:30")
    (attempt,) = wait_over(run)
    assert (attempt.cause, attempt.detail) == (Cause.finished, "its time limit")


def test_the_budget_counts_its_time_limit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "budget.yaml").write_text("gpu_hours: 10\n")
    where = ["--run-root", str(tmp_path / "r"), "--executor", "slurm", "--dry-run", "--python", SMALL_SERVER]
    fits = run_serve(str(model), *where, "--gpus", "2", "-t", "04:00:00")
    assert fits.returncode == 0, fits.stderr
    assert "its time limit was counted" in fits.stdout
    over = run_serve(str(model), *where, "--gpus", "2", "-t", "08:00:00")
    assert over.returncode == 1
    assert "budget" in over.stderr
    assert budget.main(["--run-root", str(tmp_path / "r"), "--json"]) == 0


def test_a_server_of_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model to serve"):
        api.submit(
            "jobs/serve.yaml", dry_run=True, run_root=tmp_path, overrides=["resources.gpus_per_node=0"]
        )


def test_a_server_has_no_estimate_and_estimate_says_why() -> None:
    with pytest.raises(UsageError, match="time limit"):
        estimate.main(["jobs/serve.yaml", "model.path=/nowhere"])


def test_the_script_asks_for_one_task_with_all_gpus(model: Path, tmp_path: Path) -> None:
    words = ["--executor", "slurm", "--dry-run", "--gpus", "2", "--run-root", str(tmp_path / "r")]
    done = run_serve(str(model), *words, "--python", SMALL_SERVER)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --ntasks-per-node=1" in done.stdout
    assert "#SBATCH --gpus-per-node=2" in done.stdout
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "3"], "take --gpus 2"),
        (["--gpus", "0", "--python", "/nowhere/python"], "no /nowhere/python"),
        (["--gpus", "0", "--python", f"{sys.executable} -S"], "has no vLLM"),
        (["--gpus", "0", "serve.max_model_len=64"], "the model has 32 positions"),
        (["--gpus", "0", "serve.host=0.0.0.0"], "every address"),
        (["--gpus", "0", "another"], "one model is served"),
    ],
)
def test_what_vllm_would_refuse_is_refused_before_anything_is_submitted(
    model: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    python = [] if "--python" in words else ["--python", SMALL_SERVER]
    where = ["--run-root", str(tmp_path / "r"), "--executor", "local"]
    dry = ["--dry-run"] if "3" in words else []
    done = run_serve(str(model), *words, *python, *where, *dry)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert not list((tmp_path / "r").glob("*/config.yaml"))


def test_a_folder_without_a_tokenizer_or_a_run_without_a_model_is_refused(
    model: Path, here: list[str], root: Path
) -> None:
    (model / "tokenizer.json").unlink()
    done = run_serve(str(model), *here)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr
    from tests.recorded import RecordedRun

    made = RecordedRun(root / "young")
    with pytest.raises(StateError, match=r"r1hpc\.export"):
        serve.main([str(made.run.path)])
    with pytest.raises(UsageError):
        serve.main(["nowhere"])
