"""Millions of records summed a column at a time, against sums made record by record."""

import gzip
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.accounting import account, sacct_totals
from r1hpc.accounting.account import hours_of_lines, open_sacct_file
from r1hpc.accounting.hours import Selection
from r1hpc.accounting.sacct_totals import sum_dump
from r1hpc.base.errors import StateError, UsageError
from r1hpc.slurm.sacct import pick_records, read_rows
from tests.accounting.dumps import COLUMNS, ODD_COLUMNS, SHARES, UNIT, Truth, write_dump
from tests.accounting.sacct_rows import (
    HEADER,
    ZONES,
    by_columns,
    by_rows,
    clock_of,
    in_seconds,
    outcome,
    row,
    text_of,
)


@pytest.fixture(autouse=True)
def _berlin() -> Iterator[None]:
    """A zone with two days a year that have not 24 hours."""
    with clock_of("Europe/Berlin"):
        yield


def hours_of_path(path: Path) -> dict[str, Any]:
    with open_sacct_file(path) as file:
        return hours_of_lines(file.file, file.name, Selection())


def as_seconds(truth: Truth) -> dict[str, Any]:
    groups = {f"by_{key}": dict(group) for key, group in truth.by.items()}
    groups |= {f"billing_by_{key}": dict(group) for key, group in truth.billing.items()}
    return {"total": truth.gpu_seconds, "node_hours": truth.node_seconds, **groups} | {
        "billing_hours": sum(truth.billing["user"].values())
    }


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("order", [COLUMNS, COLUMNS[::-1], (*COLUMNS[2:], "JobID", "JobName")])
def test_every_breakdown_is_exact_to_the_second(tmp_path: Path, zone: str, order: tuple[str, ...]) -> None:
    """A year of a cluster over both changes of the clock; columns in any order."""
    with clock_of(zone):
        path = tmp_path / "dump.txt"
        truth = write_dump(path, 15_000, ZONES.index(zone), order, every_s=6000)
        assert len(truth.by["day"]) > 366
        assert path.stat().st_size > account._FEW_BYTES
        assert in_seconds(hours_of_path(path)) == as_seconds(truth)


@pytest.mark.parametrize("few", [True, False])
def test_three_clusters_with_slices_shards_and_bad_rows_are_exact(
    tmp_path: Path, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by rows, as a small file is read."""
    path = tmp_path / "dump.txt"
    truth = write_dump(path, 8_000, 11, ODD_COLUMNS, every_s=4000, odd=True)
    assert truth.num_bad > 3
    if few:
        monkeypatch.setattr(account, "_FEW_BYTES", 2**30)
    with open_sacct_file(path) as file:
        hours = hours_of_lines(file.file, file.name, Selection(shares=SHARES))
    assert hours.pop("set_aside")["rows"] == truth.num_bad
    units = as_seconds(truth)
    of_gpus = {key for key in units if not key.startswith(("node", "billing"))}
    found = in_seconds(
        {key: _times(value, UNIT) if key in of_gpus else value for key, value in hours.items()}
    )
    assert found == units


def _times(value: Any, factor: int) -> Any:
    if isinstance(value, dict):
        return {name: factor * each for name, each in value.items()}
    return factor * value


def test_the_same_job_id_and_start_on_two_clusters_are_two_jobs() -> None:
    header = f"{HEADER}|Cluster"
    text = "\n".join([header, f"{row()}|alps", f"{row()}|berg", f"{row()}|berg", ""])
    selection: dict[str, Any] = {"runs": {"7": ("demo", "rl")}, "clusters": {"7": "berg"}}
    for read in (by_columns, by_rows):
        hours = in_seconds(read(text, **selection))
        assert hours["total"] == 2 * 8 * 10800
        assert hours["by_cluster"] == {"alps": 8 * 10800, "berg": 8 * 10800}
        assert hours["by_run"] == {"demo": 8 * 10800, "unknown": 8 * 10800}, "the run's cluster is berg"


def test_shards_of_unknown_size_are_named() -> None:
    text = text_of(row(AllocTRES="cpu=2,gres/shard=3,node=1"))
    for read in (by_columns, by_rows):
        assert read(text)["unknown_shares"] == ["shard"]
        assert read(text, shares={"shard": 4})["total"] == pytest.approx(3 * 0.75)


def test_only_rows_in_the_hour_of_a_clock_change_are_read_row_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [row(job=str(number)) for number in range(500)]
    rows[250] = row(job="250", start="2026-10-25T02:30:00", End="2026-10-25T03:15:00", elapsed="2700")
    seen = []
    original = read_rows

    def counted(lines: list[bytes], *others: Any, **named: Any) -> Any:
        seen.extend(lines)
        return original(lines, *others, **named)

    monkeypatch.setattr("r1hpc.accounting.sacct_totals.read_rows", counted)
    assert in_seconds(by_columns(text_of(*rows)))["total"] == 8 * (499 * 10800 + 2700)
    assert len(seen) == 1


def test_a_compressed_file_and_standard_input_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = write_dump(tmp_path / "dump.txt", 3000, 4)
    content = (tmp_path / "dump.txt").read_bytes()
    (tmp_path / "dump.gz").write_bytes(gzip.compress(content))
    assert in_seconds(hours_of_path(tmp_path / "dump.gz")) == as_seconds(truth)
    for data in (content, gzip.compress(content)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert in_seconds(hours_of_path(Path("-"))) == as_seconds(truth)
    (tmp_path / "dump.gz").write_bytes(gzip.compress(content)[:-100])
    with pytest.raises(StateError, match="damaged gzip"):
        hours_of_path(tmp_path / "dump.gz")


def test_a_mistyped_name_is_refused_with_the_nearest() -> None:
    for read in (by_columns, by_rows):
        with pytest.raises(UsageError, match=r"no started job of user 'adda' \(did you mean 'ada'"):
            read(text_of(row()), user="adda")
        with pytest.raises(UsageError, match="no started job of account 'labb'"):
            read(text_of(row()), account="lab,labb")


def test_what_is_usual_is_never_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed hangs on it: names with separators, records that stand there twice, jobs that wait."""
    path = tmp_path / "dump.txt"
    truth = write_dump(path, 15_000, 7)
    monkeypatch.delattr(sacct_totals, "read_rows")
    assert in_seconds(hours_of_path(path)) == as_seconds(truth)


def test_blocks_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dump.txt"
    truth = write_dump(path, 3000, 3)
    for size in (400, 1000, 65537):
        monkeypatch.setattr(sacct_totals, "_BLOCK_BYTES", size)
        with path.open("rb") as file:
            assert in_seconds(sum_dump(file, "dump.txt", Selection())) == as_seconds(truth)


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    truth = write_dump(tmp_path / "dump.txt", 4000, 4)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if (child := os.fork()) == 0:
        pipe.write_bytes((tmp_path / "dump.txt").read_bytes())
        os._exit(0)
    assert in_seconds(hours_of_path(pipe)) == as_seconds(truth)
    os.waitpid(child, 0)


def test_a_file_told_twice_counts_once(tmp_path: Path) -> None:
    """Two dumps one after the other, the header in the middle; the last line without its end."""
    path = tmp_path / "dump.txt"
    truth = write_dump(path, 4000, 5)
    path.write_text(path.read_text() + path.read_text().rstrip("\n"))
    assert in_seconds(hours_of_path(path)) == as_seconds(truth)


def test_of_two_records_of_one_start_the_longer_counts() -> None:
    young, old = row(elapsed="100", State="RUNNING"), row(elapsed="200")
    for rows in ((young, old), (old, young), (old, old, young, old)):
        hours = in_seconds(by_columns(text_of(*rows)))
        assert hours["total"] == 1600
        assert hours["by_state"] == {"COMPLETED": 1600}
    odd, usual = row(NNodes="+7"), row(NNodes="3")
    for rows in ((odd, usual), (usual, odd)):
        hours = in_seconds(by_columns(text_of(*rows)))
        assert hours == in_seconds(by_rows(text_of(*rows))), "of equals the last, also if one is unusual"
    again = by_columns(text_of(row(), row(start="2026-05-02T03:00:00"), row(job="7_1"), row(job="7+1")))
    assert in_seconds(again)["total"] == 4 * 8 * 10800, "another start or another task is another record"


@pytest.mark.parametrize(
    ("header", "line", "hours"),
    [
        ("JobID|Start|Elapsed|AllocTRES", "7|2026-05-01T00:00:00|1-00:30:00|gres/gpu=4", 98),
        ("JobID|Start|Elapsed|AllocTRES", "7|2026-05-01T00:00:00|00:30:00|gres/gpu=4", 2),
        ("JobID|Start|Elapsed|AllocTRES", "7|2026-05-01T00:00:00|30:00|gres/gpu=4", 2),
        ("JobID|Start|End|AllocTRES", "7|2026-05-01T00:00:00|2026-05-01T02:00:00|gres/gpu=4", 8),
        ("JobID|Start|End|AllocTRES", "7|1777586400|1777593600|gres/gpu=4", 8),
        # The night has 25 hours; and the second 02:30 of it, which only the end tells.
        ("JobID|Start|End|AllocTRES", "7|2026-10-25T00:00:00|2026-10-26T00:00:00|gres/gpu=4", 100),
        ("Elapsed|JobID|Start|AllocTRES|", "00:30:00|7|2026-05-01T00:00:00|gres/gpu=4|", 2),
    ],
)
def test_other_columns(header: str, line: str, hours: float) -> None:
    assert by_columns(f"{header}\n{line}\n")["total"] == hours


def test_line_ends_of_windows_are_no_part_of_a_cell(tmp_path: Path) -> None:
    """The state last, records that stand there twice, and a last line without its end."""
    path = tmp_path / "dump.txt"
    truth = write_dump(path, 15_000, 6, [name for name in COLUMNS if name != "State"] + ["State"])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\n"))
    assert in_seconds(hours_of_path(path)) == as_seconds(truth)
    few = path.read_bytes().split(b"\n")[:200]
    path.write_bytes(b"\n".join(few))
    plain = hours_of_path(path)
    assert not [state for state in plain["by_state"] if "\r" in state]
    assert by_columns(path.read_bytes().decode())["by_state"] == plain["by_state"]


def test_with_line_ends_of_windows_a_bad_line_is_named_by_its_own_number() -> None:
    text = text_of(row(), row(job="8"), "7|ada").replace("\n", "\r\n")
    (reason,) = by_columns(text)["set_aside"]["first"]
    assert reason.startswith("dump.txt:4 has 2 fields")


@pytest.mark.parametrize("count", [0, 5000])
def test_a_job_that_runs_is_refused_where_nothing_tells_for_how_long(count: int, tmp_path: Path) -> None:
    over = "|2026-05-01T00:00:00|2026-05-01T02:00:00|gres/gpu=4"
    rows = [f"{job}{over}" for job in range(count)]
    text = "\n".join(["JobID|Start|End|AllocTRES", *rows, "7|2026-05-01T00:00:00|Unknown|gres/gpu=4", ""])
    words = rf"dump.txt:{count + 2}: it has no End yet, and there is no ElapsedRaw"
    if count:
        assert re.search(words, by_columns(text)["set_aside"]["first"][0])
        return
    for read in (by_columns, by_rows):
        with pytest.raises(StateError, match=f"{words}.*make it again with: sacct"):
            read(text)


def test_the_end_tells_which_of_two_equal_times_is_meant() -> None:
    first = row(start="2026-10-25T02:30:00", End="2026-10-25T02:45:00", elapsed="4500")
    second = row(start="2026-10-25T02:30:00", End="2026-10-25T03:15:00", elapsed="2700")
    starts = [pick_records(text_of(line).encode().split(b"\n"), "x")[0].start for line in (first, second)]
    assert starts == [1792888200.0, 1792891800.0]
    for read in (by_columns, by_rows):  # of the second nothing lies before
        assert in_seconds(read(text_of(second), start=1792890000.0))["total"] == 8 * 2700


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7|ada|lab", r"dump.txt:5002 has 3 fields and its header 12: torn"),
        (row(start="yesterday"), r"dump.txt:5002: 'yesterday' is not a time"),
        (row(start="2026-13-01T00:00:00"), r"dump.txt:5002: '2026-13-01T00:00:00' is not a time"),
        (row(elapsed="many"), r"dump.txt:5002: .*many"),
        (row(elapsed="-5"), r"dump.txt:5002: -5 s is no time that a job ran"),
        (row(elapsed="999999999999"), r"dump.txt:5002: .* no time that a job ran"),
        (row(start="9999999999999999"), r"dump.txt:5002: .*is not a time"),
        (row(NNodes="two"), r"dump.txt:5002: .*two"),
        ("x" * 2**22, r"dump.txt:5002 is longer than"),
    ],
)
def test_a_line_that_cannot_be_read_is_set_aside_and_named(line: str, reason: str) -> None:
    before = [row(job=str(number)) for number in range(5000)]
    text = text_of(*before, line, *before[:7])
    if len(line) > sacct_totals.LONGEST_LINE:
        with pytest.raises(StateError, match=reason):
            by_columns(text)
        return
    hours = by_columns(text)
    assert hours["set_aside"]["rows"] == 1
    assert re.search(reason, hours["set_aside"]["first"][0])
    assert in_seconds({"total": hours["total"]})["total"] == 5000 * 8 * 10800


@pytest.mark.parametrize("elapsed", ["9" * 30 + "-00:00:00", "1:2:3:4", ""])
def test_a_time_that_no_job_ran_is_refused(elapsed: str) -> None:
    content = f"JobID|Start|Elapsed|AllocTRES\n7|2026-05-01T00:00:00|{elapsed}|gres/gpu=4\n".encode()
    assert "dump.txt:2: " in outcome(by_rows, content)
    assert outcome(by_columns, content) == outcome(by_rows, content)


def test_a_header_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="has no column AllocTRES"):
        by_columns("JobID|Start|ElapsedRaw\n")
    with pytest.raises(StateError, match="has no column JobID"):
        by_rows("")
    assert by_columns(HEADER)["total"] == 0


def test_more_resources_than_are_remembered(tmp_path: Path) -> None:
    """AllocTRES with the energy used: another one in each record."""
    rows = [row(job=str(n), elapsed="1", AllocTRES=f"energy={n},gres/gpu=2,node=1") for n in range(9000)]
    path = tmp_path / "dump.txt"
    path.write_text(text_of(*rows))
    assert in_seconds(hours_of_path(path))["total"] == 18_000
