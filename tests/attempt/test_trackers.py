"""The process that keeps the trackers fed, beside an attempt shorter than its start."""

from dataclasses import replace
from pathlib import Path

from r1hpc.attempt.trackers import await_trackers, start_trackers
from r1hpc.config import load
from tests.recorded import RecordedRun
from tests.telemetry.test_prometheus import parse


def test_a_short_attempt_waits_for_its_last_steps(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "short", num_steps=3)
    config = load.read(made.run.config)
    config = replace(config, monitor=replace(config.monitor, trackers=["prometheus"]))
    load.save(config, made.run.config)
    made.submit("local-1")
    made.attempt(1, 3, "finished")
    start_trackers(made.run, config, 1)
    await_trackers(made.run)  # it has hardly started
    assert parse((made.run.metrics / "r1hpc.prom").read_text())["r1hpc_global_step", 'run="short"'] == 3
