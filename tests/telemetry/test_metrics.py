"""The metric records: written to the bit, folded over attempts, and what they prove about the data."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records import metrics
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.recorded import GLOBAL_BATCH, RecordedRun, bytes_read, loss_of


@pytest.fixture
def recorded(tmp_path: Path) -> RecordedRun:
    made = RecordedRun(tmp_path / "run")
    made.submit("local-1")
    return made


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_every_double_comes_back_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"))
    writer = MetricWriter(run, 1)
    for step, value in enumerate(values, start=1):
        writer.step(global_step=step, loss=value, grad_norm=-value)
    read = metrics.read_steps(run)
    assert [_bits(x) for x in read.column("loss")] == [_bits(x) for x in values]
    assert [_bits(x) for x in read.column("grad_norm")] == [_bits(-x) for x in values]


def test_a_value_that_json_lacks_is_null_and_named(recorded: RecordedRun) -> None:
    MetricWriter(recorded.run, 1).step(global_step=1, loss=2.0, grad_norm=math.inf, skipped=True)
    line = recorded.run.train_metrics.read_text()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record["grad_norm"] is None
    assert record["nonfinite"] == {"grad_norm": "inf"}
    step = metrics.read_steps(recorded.run).effective[1]
    assert step.grad_norm == math.inf
    assert step.skipped
    assert step.extra is None


def test_fields_of_other_stages_are_kept(recorded: RecordedRun) -> None:
    MetricWriter(recorded.run, 1).step(global_step=1, loss=2.0, reward=0.25)
    assert metrics.read_steps(recorded.run).column("reward") == [0.25]


def test_a_run_without_steps_is_empty(recorded: RecordedRun) -> None:
    steps = metrics.read_steps(recorded.run)
    assert (steps.effective, steps.lost) == ({}, ())
    assert metrics.last_steps(recorded.run, 5) == []
    assert metrics.read_events(recorded.run) == []
    assert metrics.audit_ledger(recorded.run).num_steps == 0


def test_the_highest_attempt_wins_and_the_rest_is_lost(recorded: RecordedRun) -> None:
    recorded.attempt(1, 20, "crash", committed=15)
    recorded.attempt(16, 18, "crash", committed=15)
    recorded.attempt(16, 30, "finished", committed=30)
    steps = metrics.read_steps(recorded.run)
    assert list(steps.effective) == list(range(1, 31))
    assert [s.attempt for s in steps.effective.values()] == [1] * 15 + [3] * 15
    assert sorted((s.attempt, s.global_step) for s in steps.lost) == [
        *((1, n) for n in range(16, 21)),
        *((2, n) for n in range(16, 19)),
    ]


def test_what_lies_beyond_the_newest_attempt_is_lost_before_it_is_taken_again(recorded: RecordedRun) -> None:
    recorded.attempt(1, 20, "crash", committed=10)
    recorded.begin(resumed_from=10)
    recorded.steps(11, 12)
    steps = metrics.read_steps(recorded.run)
    last = list(steps.effective.values())[-1]
    assert (last.global_step, last.attempt) == (12, 2)
    assert [s.global_step for s in steps.lost] == [11, 12, *range(13, 21)]


@given(cut=st.integers(min_value=1, max_value=120), data=st.data())
def test_a_torn_line_costs_that_line_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int, data: st.DataObject
) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"))
    for step in range(1, 6):
        MetricWriter(run, 1).step(global_step=step, loss=loss_of(step))
    raw = run.train_metrics.read_bytes()
    cut = min(cut, len(raw.splitlines()[-1]))
    run.train_metrics.write_bytes(raw[:-cut])
    MetricWriter(run, 2).step(global_step=5, loss=loss_of(5))
    MetricWriter(run, 2).step(global_step=6, loss=loss_of(6))
    steps = metrics.read_steps(run)
    assert steps.column("loss") == [loss_of(step) for step in range(1, 7)]
    assert all(s.global_step == 5 for s in steps.lost)


def test_a_hole_of_zeros_and_lines_of_others_are_passed_over(recorded: RecordedRun) -> None:
    recorded.attempt(1, 3, "crash")
    with recorded.run.train_metrics.open("ab") as file:
        file.write(b"\0" * 4096 + b'\n[1, 2]\n"text"\n\n{"global_step": "7", "attempt": 1}\n\xff\xfe\n')
    MetricWriter(recorded.run, 2).step(global_step=4, loss=1.0)
    assert list(metrics.read_steps(recorded.run).effective) == [1, 2, 3, 4]


def test_the_newest_lines_are_read_from_the_end(recorded: RecordedRun) -> None:
    recorded.attempt(1, 30, "crash")
    assert [s.global_step for s in metrics.last_steps(recorded.run, 3)] == [28, 29, 30]
    whole = [s.global_step for s in metrics.last_steps(recorded.run, 100)]
    assert whole == list(range(1, 31))
    assert [s.global_step for s in metrics.last_steps(recorded.run, 100, tail_bytes=1000)] == whole[-3:]


def test_a_resumed_run_compares_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, broken = RecordedRun(tmp_path / "a"), RecordedRun(tmp_path / "b")
    straight.attempt(1, 40, "finished", committed=40)
    broken.attempt(1, 20, "crash", committed=10)
    broken.attempt(11, 40, "finished", committed=40)
    assert metrics.compare(straight.run, broken.run) == []


def test_one_bit_of_difference_is_found(tmp_path: Path) -> None:
    a, b = RecordedRun(tmp_path / "a"), RecordedRun(tmp_path / "b")
    for made in (a, b):
        made.attempt(1, 5, "crash")
    text = b.run.train_metrics.read_text()
    other = math.nextafter(loss_of(3), 9.0)
    b.run.train_metrics.write_text(text.replace(repr(loss_of(3)), repr(other)))
    (difference,) = metrics.compare(a.run, b.run)
    assert difference == (3, "loss", loss_of(3).hex(), other.hex())


def test_a_step_that_only_one_run_took_is_a_difference(tmp_path: Path) -> None:
    a, b = RecordedRun(tmp_path / "a"), RecordedRun(tmp_path / "b")
    a.attempt(1, 5, "crash")
    b.attempt(1, 4, "crash")
    assert metrics.compare(a.run, b.run) == [(5, "global_step", "attempt 1", "-")]
    assert metrics.compare(b.run, a.run) == [(5, "global_step", "-", "attempt 1")]


def test_a_run_over_three_attempts_consumed_each_sample_once(recorded: RecordedRun) -> None:
    for first, last in ((1, 20), (16, 25), (26, 40)):
        recorded.attempt(first, last, "crash")
    audit = metrics.audit_ledger(recorded.run)
    assert audit.exactly_once
    assert (audit.num_steps, audit.num_samples, audit.num_lost_steps) == (40, 40 * GLOBAL_BATCH, 5)
    assert audit.to_json()["exactly_once"] is True
    assert {r.attempt for n, r in metrics.read_ledger(recorded.run).items() if 16 <= n <= 25} == {2}


def test_ten_attempts_are_folded_in_the_order_of_their_numbers(recorded: RecordedRun) -> None:
    for _ in range(11):
        recorded.begin()
        recorded.consume(1)
    assert metrics.read_ledger(recorded.run)[1].attempt == 11


@pytest.mark.parametrize(
    ("first", "field", "expected"),
    [
        (3 * GLOBAL_BATCH - 2, "repeated_samples", ((22, 23),)),
        (3 * GLOBAL_BATCH + 3, "skipped_samples", ((24, 26),)),
        (0, "repeated_samples", ((0, 7),)),
    ],
)
def test_a_step_that_does_not_begin_where_the_last_one_ended_is_found(
    recorded: RecordedRun, first: int, field: str, expected: tuple[tuple[int, int], ...]
) -> None:
    recorded.attempt(1, 3, "crash")
    recorded.begin()
    recorded.consume(4, first=first)
    audit = metrics.audit_ledger(recorded.run)
    assert getattr(audit, field) == expected
    assert not audit.exactly_once


def test_a_run_that_begins_with_a_later_item_read_it_once(recorded: RecordedRun) -> None:
    """Reinforcement learning in a chain: its first question is the one after those of the cold start."""
    recorded.begin()
    recorded.consume(1, first=60_000)
    recorded.consume(2, first=60_000 + GLOBAL_BATCH)
    assert metrics.audit_ledger(recorded.run).skipped_samples == ((0, 59_999),)
    write_json(recorded.run.plan, {"first_item": 60_000})
    assert metrics.audit_ledger(recorded.run).exactly_once
    write_json(recorded.run.plan, {"first_item": 59_990})
    assert metrics.audit_ledger(recorded.run).skipped_samples == ((59_990, 59_999),)


def test_missing_and_changed_steps_and_wrong_sums_are_found(recorded: RecordedRun) -> None:
    recorded.attempt(1, 6, "crash")
    recorded.begin()
    for step in (6, 9):
        recorded.consume(step)
    path = recorded.run.ledger / "attempt_2.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["checksum"] += 1
    lines[1]["sample_sum"] -= 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    audit = metrics.audit_ledger(recorded.run)
    assert audit.missing_steps == ((7, 8),)
    assert audit.changed_steps == (6,)
    assert audit.wrong_steps == (9,)
    assert not audit.exactly_once


def test_ranges_are_cut_for_a_person() -> None:
    assert metrics.format_ranges([(3, 5), (9, 9)]) == "3-5, 9"
    assert metrics.format_ranges([(n, n) for n in range(0, 20, 2)]) == "0, 2, 4, 6 and 6 more"


def test_a_hundred_thousand_steps_are_read_in_seconds_at_most(recorded: RecordedRun) -> None:
    """Measured at 0.6 s of CPU; the bound only catches a fold that is no longer linear."""
    MetricWriter(recorded.run, 1).step(global_step=0, loss=2.5, grad_norm=0.1, lr=1e-4, tokens=1, time=1.5)
    line = recorded.run.train_metrics.read_text()
    with recorded.run.train_metrics.open("w") as file:
        file.writelines(line.replace('"global_step": 0', f'"global_step": {n}') for n in range(1, 100_001))
    began = time.process_time()
    steps = metrics.read_steps(recorded.run)
    assert len(steps.effective) == 100_000
    assert time.process_time() - began < 60
    before = bytes_read()
    assert metrics.last_steps(recorded.run, 20)[-1].global_step == 100_000
    assert bytes_read() - before < 2**18 < recorded.run.train_metrics.stat().st_size / 10


def test_follow_steps_gives_each_whole_line_once(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    newer = metrics.follow_steps(made.run)
    assert newer() == []
    made.begin()
    made.steps(1, 3)
    with made.run.train_metrics.open("a") as file:
        file.write('{"global_step": 4, "att')
    assert [step.global_step for step in newer()] == [1, 2, 3]
    assert newer() == []
    with made.run.train_metrics.open("a") as file:
        file.write('empt": 1}\n')
    assert [step.global_step for step in newer()] == [4]


def _bits(value: float | None) -> str:
    return "None" if value is None else value.hex()
