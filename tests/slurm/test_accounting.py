"""Accounting records and the GPUs in them."""

import time
from pathlib import Path

import pytest

from r1hpc.base.errors import StateError
from r1hpc.slurm.gres import gpus_by_type
from r1hpc.slurm.sacct import parse_records, sacct_records

# `sacct -D -X -P -n -o FIELDS` of Slurm 24.11.5 with SLURM_TIME_FORMAT=%s; the second name is hostile.
LINES = [
    "1|REQUEUED|1795568611|1795568614|3|billing=2,cpu=2,gres/gpu:a100=8,gres/gpu=8,node=2|2|r1n[1-2]|0:0"
    "|root|research|main|scavenger|1795568600|1795568601|a1",
    "1|CANCELLED by 0|1795568620|Unknown|2|cpu=2,node=2|2|r1n[1-2]|1:0|root|research|main|scavenger"
    "|1795568614|Unknown|a|b|c",
    "2|PENDING|Unknown|Unknown|0||2|None assigned|0:0|root|research|main|scavenger|1795568614|1795568619|x",
]


def test_each_attempt_is_a_record() -> None:
    first, second, waiting = parse_records(LINES)
    assert (first.state, first.gpus, first.elapsed_s, first.nodes) == ("REQUEUED", 8, 3, 2)
    assert (first.start, first.end) == (1795568611, 1795568614)
    assert (second.state, second.end) == ("CANCELLED", None)
    assert (waiting.start, waiting.gpus) == (None, 0)
    assert [r.eligible for r in (first, second, waiting)] == [1795568601, 1795568614, 1795568619]


def test_a_bar_in_a_job_name_breaks_nothing() -> None:
    assert parse_records(LINES)[1].job_name == "a|b|c"


def test_a_host_whose_clock_is_behind_sees_the_newest_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sacct shows what was eligible before its -E, which is the host's own time where it is not given."""
    row = LINES[0].replace("1795568601", str(int(time.time()) + 300))
    show = "until=$(date +%s)\nwhile [ $# -gt 0 ]; do [ $1 != -E ] || until=${2#uts}; shift; done\n"
    (tmp_path / "sacct").write_text(
        f"#!/bin/bash\n{show}[ $until -lt $(($(date +%s) + 300)) ] || echo '{row}'\n"
    )
    (tmp_path / "sacct").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert [record.state for record in sacct_records("1")] == ["REQUEUED"]


def test_another_line_is_refused() -> None:
    with pytest.raises(StateError, match="2 fields"):
        parse_records(["1|RUNNING"])


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("billing=4,cpu=4,gres/gpu:a100=8,gres/gpu=8,node=4", 8),
        ("cpu=4,gres/gpu=8", 8),
        ("cpu=4,gres/gpu:a100=8,node=1", 8),
        ("gres/gpu:a100=4,gres/gpu:h100=2", 6),
        ("gres/gpu=2,gres/gpu:a100_3g.20gb=2,node=1", 6 / 7),
        ("gres/gpu:1g.10gb=7", 1),
        ("gres/gpu:1g.6gb=2", 0.5),  # an A30 has four
        ("gres/gpu:1c.3g.20gb=1", 1 / 7),
        ("gres/gpu:nvidia_a100_80gb_pcie=2", 2),
        ("gres/gpu=5,gres/gpu:a100=3", 5),
        ("cpu=4,gres/gpumem=80G,node=1", 0),
        ("cpu=4,gres/gpuutil=100,gres/gpu=2", 2),
        ("", 0),
    ],
)
def test_gpus_are_counted_once(tres: str, gpus: int) -> None:
    assert sum(gpus_by_type(tres).values()) == pytest.approx(gpus, rel=1e-12)
