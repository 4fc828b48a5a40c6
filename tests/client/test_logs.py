"""Numbers that a script logs are recorded, and written out when a graceful stop ends its process."""

from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.client.run import AGAIN
from r1hpc.telemetry.records.metrics import MetricWriter, read_events, read_logged, read_steps
from tests.client.attempts import as_attempt


def test_a_stop_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    code = (
        "import logging, logging.handlers, sys\n"
        "from r1hpc.client.run import attempt\n"
        "class Wandb:\n"
        "    run = 'open'\n"
        "    def finish(self): open('finished', 'w').write('yes')\n"
        "sys.modules['wandb'] = Wandb()\n"
        "file = open('metrics.csv', 'w')\n"
        "file.write('step,loss')\n"
        "run = attempt()\n"
        "run.name_not_kept({'callback: it (a count)'})\n"
        "run.name_not_kept({'callback: it (a count)'})\n"
        "run.leave(3)\n"
    )
    run = RunDir(tmp_path / "run")
    done = as_attempt(run, 1, ["-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}"])
    assert done.returncode == AGAIN, done.stderr
    assert (tmp_path / "metrics.csv").read_text() == "step,loss"
    assert (tmp_path / "finished").read_text() == "yes"
    assert done.stderr.count("not kept over a resume: callback: it (a count)") == 1
    assert [event["names"] for event in read_events(run)] == [["callback: it (a count)"]]


def test_logged_numbers_are_read_by_name_and_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first, second = MetricWriter(run, 1), MetricWriter(run, 2)
    for step in (2, 4, 6):
        first.logged(step, {"loss": step / 2, "text": "none"})
    first.logged(4, {"eval_loss": float("nan")})
    second.event("resume", global_step=3)  # 4 and 6 are taken again
    second.logged(4, {"loss": 9.0})
    second.logged(4, {"eval_loss": 0.5})
    logged = read_logged(run)
    assert logged == {"loss": {2: 1.0, 4: 9.0}, "eval_loss": {4: 0.5}}
    assert read_steps(run).effective == {}


def test_a_second_training_is_refused_and_is_no_crash(tmp_path: Path) -> None:
    code = "from r1hpc.client.run import attempt; run = attempt(); run.lead('x'); run.lead('x')"
    run = RunDir(tmp_path / "run")
    done = as_attempt(run, 1, ["-c", code])
    assert done.returncode == 1
    assert "this script trains twice" in done.stderr
    assert '"kind": "refused"' in (run.attempt_dir(1) / "script_0.json").read_text()
