"""r1hpc.prom as node_exporter's textfile collector reads it."""

import math
import re
import threading
from pathlib import Path

import pytest

from r1hpc import export_metrics as command
from r1hpc.telemetry.records.ranks import RankTimeWriter
from r1hpc.telemetry.trackers.prometheus import collect, render, write_textfile
from tests.recorded import EPOCH, RecordedRun

_SAMPLE = re.compile(r'([a-z0-9_:]+)\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\} (\S+)')


def parse(text: str) -> dict[tuple[str, str], float]:
    """(metric, labels) -> value, checked line by line against the exposition format."""
    found: dict[tuple[str, str], float] = {}
    typed: set[str] = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in ("gauge", "counter")
            assert name not in typed, "one block for each metric"
            typed.add(name)
        elif not line.startswith("# HELP "):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] in typed, "TYPE comes before the samples"
            assert (match[1], match[2]) not in found, "no sample twice"
            found[match[1], match[2]] = float(match[3])
    return found


@pytest.fixture
def made(tmp_path: Path) -> RecordedRun:
    made = RecordedRun(tmp_path / "runs" / "demo", gpus=4, nodes=2)
    made.submit("4711", "slurm")
    made.begin()
    start = made.clock
    made.steps(1, 30)
    for node in made.nodes:
        made.gpu_ticks(start, 40, node=node)
    uuids = ["GPU-n1-0", "GPU-n1-1", "GPU-n2-0", "GPU-n2-1"]
    ranks = RankTimeWriter(made.run, 1, ["n1", "n1", "n2", "n2"], uuids)
    for step in (10, 20):
        times = {"step_time_s": [1.0] * 4, "wait_s": [0.1, 0.2, 0.3, step / 100]}
        ranks.write(global_step=step, num_steps=10, **times)
    return made


def test_the_newest_step_rank_and_reading_of_each_gpu(made: RecordedRun) -> None:
    path = write_textfile(made.run)
    found = parse(path.read_text())
    run = 'run="demo"'
    assert found["r1hpc_global_step", run] == 30
    assert found["r1hpc_mfu_ratio", run] == 0.4
    assert found["r1hpc_last_step_timestamp_seconds", run] == made.clock > EPOCH
    assert found["r1hpc_rank_wait_seconds", f'{run},node="n2",rank="3"'] == 0.2
    gpu = f'{run},node="n2",gpu="GPU-n2-1",rank="3"'
    assert found["r1hpc_gpu_memory_used_bytes", gpu] == 31 * 2**30
    assert found["r1hpc_gpu_energy_joules_total", gpu] == 300 * 39
    assert "r1hpc_gpu_sm_clock_hertz" not in {name for name, _ in found}, "never read, so not there"
    assert len([name for name, _ in found if name == "r1hpc_gpu_power_watts"]) == 4


def test_readings_of_the_stub_say_so(made: RecordedRun) -> None:
    made.gpu_ticks(made.clock, 5, node="n1", source="stub")
    text = write_textfile(made.run).read_text()
    assert 'gpu="GPU-n1-0",rank="0",source="stub"' in text
    assert 'gpu="GPU-n2-0",rank="2"}' in text


def test_a_node_that_an_earlier_attempt_had_is_not_told_as_of_now(made: RecordedRun) -> None:
    made.begin()
    made.gpu_ticks(made.clock, 5, node="n7")
    text = write_textfile(made.run).read_text()
    assert 'node="n7",gpu=' in text
    assert 'node="n1",gpu=' not in text


def test_a_run_without_a_step_or_a_gpu_still_says_that_it_is_watched(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    assert list(parse(write_textfile(made.run).read_text())) == [
        ("r1hpc_written_timestamp_seconds", 'run="demo"')
    ]


def test_stages_of_two_chains_have_files_and_labels_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "textfile"
    out.mkdir()
    for chain in ("one", "two"):
        (tmp_path / chain).mkdir()
        (tmp_path / chain / "chain.yaml").touch()
        made = RecordedRun(tmp_path / chain / "grpo")
        assert command.main([str(made.run.path), "--to", "prometheus", "--out", str(out)]) == 0
    found = {path.name: list(parse(path.read_text())) for path in out.iterdir()}
    assert found == {
        f"r1hpc-{chain}+grpo.prom": [("r1hpc_written_timestamp_seconds", f'run="{chain}/grpo"')]
        for chain in ("one", "two")
    }


def test_label_values_and_odd_numbers_are_written_as_the_format_wants() -> None:
    odd = {"run": 'a"b\\c\nd'}
    values = (math.nan, math.inf, -math.inf, 1e-12, 3)
    lines = render(
        [("r1hpc_loss", {**odd, "i": str(i)}, value) for i, value in enumerate(values)]
    ).splitlines()
    assert lines[2] == 'r1hpc_loss{run="a\\"b\\\\c\\nd",i="0"} NaN'
    assert [line.split("} ")[1] for line in lines[2:]] == ["NaN", "+Inf", "-Inf", "1e-12", "3"]


def test_a_reader_never_sees_half_a_file(made: RecordedRun) -> None:
    path = write_textfile(made.run)
    stopping = threading.Event()

    def keep_writing() -> None:
        while not stopping.is_set():
            write_textfile(made.run)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        lengths = {len(parse(path.read_text())) for _ in range(100)}
    finally:
        stopping.set()
        writer.join()
    assert len(lengths) == 1
    assert [each.name for each in path.parent.glob("*.prom*")] == ["r1hpc.prom"]


def test_a_sampler_that_died_is_not_told_as_of_now(made: RecordedRun) -> None:
    made.steps(41, 42, step_s=300.0)
    assert "r1hpc_gpu_utilization_percent" not in render(collect(made.run))
