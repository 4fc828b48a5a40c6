"""Millions of records summed a column at a time, against sums made record by record."""

import gzip
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.accounting import account, sacct_totals
from r1hpc.accounting.account import hours_of_file, hours_of_lines, open_sacct_file
from r1hpc.accounting.hours import Selection
from r1hpc.accounting.sacct_totals import sum_dump
from r1hpc.base.errors import StateError, UsageError
from r1hpc.slurm.sacct import pick_records, read_rows
from tests.accounting.dumps import COLUMNS, ODD_COLUMNS, SHARES, UNIT, Truth, write_dump

HEADER = "JobID|JobName|User|Account|Partition|QOS|State|Start|End|ElapsedRaw|NNodes|AllocTRES"


ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC")
"""On Lord Howe Island the clock is changed by half an hour; Kolkata's is half an hour off."""


@contextmanager
def clock_of(zone: str) -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        yield
    finally:
        os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
        time.tzset()


@pytest.fixture(autouse=True)
def _berlin() -> Iterator[None]:
    """A zone with two days a year that have not 24 hours."""
    with clock_of("Europe/Berlin"):
        yield


def by_columns(text: str | bytes, **selected: Any) -> dict[str, Any]:
    content = text if isinstance(text, bytes) else text.encode()
    return sum_dump(io.BytesIO(content), "dump.txt", Selection(**selected))


def hours_of_path(path: Path) -> dict[str, Any]:
    with open_sacct_file(path) as file:
        return hours_of_file(file, Selection())


def by_rows(text: str | bytes, **selected: Any) -> dict[str, Any]:
    """The same, record by record, as a small file is read."""
    content = text if isinstance(text, bytes) else text.encode()
    assert len(content) < account._FEW_BYTES
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        return hours_of_lines(file, "dump.txt", Selection(**selected))


def in_seconds(hours: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {name: round(3600 * value) for name, value in group.items()}
        if isinstance(group, dict)
        else round(3600 * group)
        for key, group in hours.items()
        if key not in ("set_aside", "unknown_shares")
    } | {key: hours[key] for key in ("set_aside", "unknown_shares") if key in hours}


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
        hours = hours_of_file(file, Selection(shares=SHARES))
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


def row(job: str = "7", start: str = "2026-05-01T22:00:00", elapsed: str = "10800", **cells_: str) -> str:
    usual = {
        "JobName": "a",
        "User": "ada",
        "Account": "lab",
        "Partition": "gpu",
        "QOS": "normal",
        "State": "COMPLETED",
        "End": "Unknown",
        "NNodes": "1",
        "AllocTRES": "gres/gpu:a100=8,gres/gpu=8",
    }
    found = {**usual, "JobID": job, "Start": start, "ElapsedRaw": elapsed, **cells_}
    return "|".join(found[name] for name in HEADER.split("|"))


def text_of(*rows: str) -> str:
    return "\n".join([HEADER, *rows]) + "\n"


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


JOBS = ("1", "12345678", "123456789", "4_1", "4_10", "5+0", "99999999999_1234567", "6.batch")
OWNERS = dict(zip(JOBS, ("ada", "bob", "x" * 40, "ädä", "", "ada", "ada", "bob"), strict=True))


def owned_row(job: str, **cells_: str) -> str:
    return row(job, User=OWNERS[job], **cells_)


def _rows(**odd: list[str]) -> st.SearchStrategy[str]:
    """Rows of jobs as there are, and of such as there should not be."""
    usual = {
        "start": [
            "2026-03-29T01:59:59",
            "2026-03-29T03:00:00",
            "2026-10-25T02:30:00",
            "2026-10-24T23:59:59",
            "2026-10-25T00:00:00",
            "2026-04-05T01:45:00",
            "2026-02-28T12:00:00",
            "Unknown",
            "None",
            "",
            "0",
        ],
        "elapsed": ["0", "1", "59", "3600", "86400", "90061", "900000", "10000000", "007"],
        "End": ["Unknown", "2026-10-25T03:30:00", "2026-10-25T02:31:00"],
        "State": ["RUNNING", "CANCELLED by 1000", "CANCELLED by 1", "COMPLETED", ""],
        "NNodes": ["1", "16", "", "1024"],
        "AllocTRES": [
            "",
            "cpu=4,node=2",
            "gres/gpu=3",
            "gres/gpu:a100=3,node=1",
            "gres/gpu:a100=4,gres/gpu:h100=2",
            "billing=4,cpu=4,energy=12345,gres/gpu:a100=8,gres/gpu=8,mem=16G,node=4",
            "gres/gpumem=80G,gres/gpuutil=100",
        ],
    }
    name = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12)
    cells = {key: st.sampled_from(odd.get(key, values)) for key, values in usual.items()}
    return st.builds(owned_row, job=st.sampled_from(JOBS), JobName=name, **cells)


ROWS = _rows()
ODD_ROWS = st.one_of(
    _rows(
        start=[
            "1777629600",
            "2026-05-01",
            "2026-05-01T10",
            "2026-05-01T10:30",
            "2026-05-01 10:30:00",
            "2026-05-01T10:30:60",
            "2026-05-01T10:30:00Z",
            "2026-03-29T02:30:00",
            "2026-02-29T10:30:00",
            "1969-12-31T12:00:00",
            "2345-01-01T00:00:00",
            "9999999999",
            "Start",
            "-5",
        ]
    ),
    _rows(elapsed=["400000000", "3000000000", "9" * 30, "-5", "+7", " 8", "1_0", "٣", "0x10", "many", ""]),
    _rows(NNodes=["3000000000", "9" * 30, "-5", "+7", " 8", "two"]),
    _rows(AllocTRES=["gres/gpu=3000000000", f"gres/gpu={'9' * 30}", f"node={'9' * 30}"]),
)


SHORT = HEADER.replace("|End", "")
"""What hours do not need is not looked at when they are summed by columns: the end beside ElapsedRaw."""
DAMAGES = (
    "torn",
    "longer",
    "blank",
    "header",
    "marked header",
    "return",
    "return inside",
    "no UTF-8",
    "half",
)


def damaged(line: str, how: str, at: int) -> bytes:
    """What becomes of lines between sacct and here."""
    before, _, *after = line.rsplit("|", 4)
    raw = "|".join([before, *after]).encode()
    at %= len(raw) + 1
    ways = {
        "nothing": raw,
        "torn": raw[:at],
        "longer": raw + b"|",
        "blank": b" " * (at % 3),
        "header": SHORT.encode(),
        "marked header": b"\xef\xbb\xbf" + SHORT.encode(),
        "return": raw + b"\r",
        "return inside": raw[:at] + b"\r" + raw[at:],
        "no UTF-8": raw[:at] + b"\xff" + raw[at:],
        "half": raw[:at] + "é".encode()[:1] + raw[at:],
    }
    return ways[how]


LINES = st.one_of(
    ROWS.map(lambda line: damaged(line, "nothing", 0)),
    st.builds(damaged, ROWS, st.sampled_from(DAMAGES), st.integers(0, 99)),
    ODD_ROWS.map(lambda line: damaged(line, "nothing", 0)),
)
ENDS = st.sampled_from([b"\n", b"\r\n"])
SIZES = st.sampled_from([1, 200, 500, 2**21])
"""Of a block: with few lines in it what is as usual is read by columns, beside what is not."""
SELECTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "user": st.just("ada"),
        "account": st.sampled_from(["lab", "PHY,lab"]),
        "start": st.sampled_from([1777650000.0, 1792890000.0]),  # the second between two that show 02:30
        "end": st.just(1793000000.0),
        "runs": st.just({"4_1": ("demo", "sft"), "12345678": ("demo", "rl"), "none": ("x", "y")}),
    },
)


def outcome(read: Callable[..., dict[str, Any]], content: bytes, **selected: Any) -> Any:
    try:
        return in_seconds(read(content, **selected))
    except (StateError, UsageError) as error:
        return str(error)


def check_that_both_agree(content: bytes, zone: str, size: int, selected: dict[str, Any]) -> None:
    with clock_of(zone), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sacct_totals, "_BLOCK_BYTES", size)
        assert outcome(by_columns, content, **selected) == outcome(by_rows, content, **selected)


@settings(max_examples=300)
@given(
    st.lists(ROWS.filter(lambda line: line.count("|") == HEADER.count("|")), max_size=12),
    ENDS,
    st.permutations(HEADER.split("|")),
    st.sets(st.sampled_from(["ElapsedRaw", "NNodes", "JobName", "QOS", "End"])),
    st.sampled_from(ZONES),
    SIZES,
    SELECTIONS,
)
def test_columns_and_rows_agree_whatever_columns_there_are(
    rows: list[str],
    end: bytes,
    order: list[str],
    without: set[str],
    zone: str,
    size: int,
    selected: dict[str, Any],
) -> None:
    at = [HEADER.split("|").index(name) for name in order if name not in without]
    lines = ["|".join(line.split("|")[i] for i in at) for line in [HEADER, *rows]]
    check_that_both_agree(end.join(line.encode() for line in lines), zone, size, selected)


@settings(max_examples=300)
@given(st.lists(LINES, max_size=12), ENDS, st.sampled_from(ZONES), SIZES, SELECTIONS)
def test_columns_and_rows_agree_on_lines_that_were_damaged(
    lines: list[bytes], end: bytes, zone: str, size: int, selected: dict[str, Any]
) -> None:
    """The same sums, or the same error about the same line."""
    check_that_both_agree(end.join([SHORT.encode(), *lines]), zone, size, selected)


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
