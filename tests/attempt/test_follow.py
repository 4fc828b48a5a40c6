"""What `submit --follow` prints, of run folders that were written beforehand."""

import io
from pathlib import Path

import pytest

from r1hpc.attempt.state.follow import follow
from tests.recorded import RecordedRun


@pytest.mark.parametrize("skew", [-300, 0, 300])
def test_a_resumed_run_is_followed_from_its_new_submission(tmp_path: Path, skew: float) -> None:
    """The login node's clock differs from that of the attempts by `skew`."""
    made = RecordedRun(tmp_path / "demo")
    made.submit("local-1")
    made.attempt(1, 20, "cancelled", committed=20, detail="cancelled by a user")
    made.clock += skew
    made.submit("local-2")
    made.clock -= skew
    made.attempt(21, 40, "finished", committed=40)
    out = io.StringIO()
    assert follow(made.run, "local-2", out) == 0
    shown = out.getvalue()
    assert "attempt 2 begins" in shown
    assert "step 40" in shown
    assert "attempt 1" not in shown
    assert shown.endswith("demo: finished\n")


def test_a_run_that_failed_names_its_logs(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    made.submit("local-1")
    made.attempt(1, 20, "crash", committed=0, detail="rank 0 on n1: it broke")
    out = io.StringIO()
    assert follow(made.run, "local-1", out) == 1
    assert "attempt 1 ended: crash: rank 0 on n1: it broke\n" in out.getvalue()
    assert f"see {made.run.logs}" in out.getvalue()
