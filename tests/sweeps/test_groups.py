"""Two groups of runs compared over their seeds, and what was compared."""

from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc import report
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import append_record, write_json
from r1hpc.config import load
from r1hpc.sweeps.groups import compare_groups
from tests.recorded import RecordedRun


def add_run(
    root: Path, name: str, seed: int, accuracy: float, lr: float = 1e-3, asked: str = "t"
) -> RecordedRun:
    made = RecordedRun(root / name, stage="rl")
    config = load.read(made.run.config)
    load.save(replace(config, train=replace(config.train, seed=seed, lr=lr)), made.run.config)
    made.submit("local-1")
    made.attempt(1, 4, "finished", committed=4, reward=accuracy / 2)
    made.run.finished.touch()
    value = {"value": accuracy, "low": 0.0, "high": 1.0}
    line = {
        "greedy": value,
        "pass_at": {"1": value},
        "num_items": 8,
        "num_samples": 1,
        "response_length": 1.0,
    }
    append_record(made.run.rl_evaluations, {"global_step": 4, "attempt": 1, "time": 1.0, **line})
    write_json(made.run.metrics / "evaluated.json", {"task": asked})
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, base, new in ((1, 0.2, 0.5), (2, 0.3, 0.7), (3, 0.4, 0.6)):
        add_run(tmp_path, f"base-{seed}", seed, base)
        add_run(tmp_path, f"new-{seed}", seed, new, lr=1e-2)
    return tmp_path


def test_means_with_intervals_and_what_differs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_groups("base-*", "new-*", root).to_json()
    difference = found["numbers"]["pass@1"]["difference"]
    # Welch, equal variances of 0.01: 0.3 ± 2.776 * sqrt(2 * 0.01 / 3), 4 degrees of freedom
    assert difference["value"] == pytest.approx(0.3)
    assert (difference["low"], difference["high"]) == pytest.approx((0.3 - 0.22666, 0.3 + 0.22666), abs=1e-3)
    assert report.main(["--compare", "base-*", "new-*", "--run-root", str(root)]) == 0
    text = capsys.readouterr().out
    for words in ("A  base-*: 3 finished runs, base-1, base-2, base-3", "0.3 ± 0.25", "[+0.073"):
        assert words in text
    assert "differ between the groups: train.lr 0.001 and 0.01" in text


def test_other_questions_are_not_compared(root: Path) -> None:
    add_run(root, "new-4", 4, 0.9, lr=1e-2, asked="other questions")
    found = compare_groups("base-*", "new-*", root)
    assert set(found.values) == {"reward", "loss"}
    assert any("asked other questions" in note for note in found.notes)


def test_unfinished_runs_and_mixed_settings_are_named(root: Path) -> None:
    add_run(root, "base-4", 4, 0.3, lr=5e-3)
    (root / "base-3" / "FINISHED").unlink()
    notes = " ".join(compare_groups("base-*", "new-*", root).notes)
    assert "not finished, and left out: base-3" in notes
    assert "differ inside a group: train.lr" in notes


def test_one_run_has_no_interval(root: Path) -> None:
    found = compare_groups("base-1", "new-*", root)
    assert "low" not in found.to_json()["numbers"]["pass@1"]["difference"]
    assert any("base-1 has one run: no interval" in note for note in found.notes)


def test_what_cannot_be_compared(root: Path) -> None:
    with pytest.raises(UsageError, match="none of 0 runs"):
        compare_groups("nobody-*", "new-*", root)
    with pytest.raises(UsageError, match="in both groups"):
        compare_groups("base-*", "base-1*", root)


def test_questions_that_are_not_on_record_are_not_taken_for_the_same(root: Path) -> None:
    for record in root.glob("*/metrics/evaluated.json"):
        record.unlink()
    assert set(compare_groups("base-*", "new-*", root).values) == {"reward", "loss"}


def test_a_damaged_record_is_named(root: Path) -> None:
    (root / "new-2" / "metrics" / "evaluated.json").write_text("[]")
    with pytest.raises(R1hpcError, match=r"new-2/metrics/evaluated\.json"):
        compare_groups("base-*", "new-*", root)
