"""Sums by several keys at once, against integers summed record by record."""

import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from r1hpc.accounting.hours import Selection
from r1hpc.accounting.sacct_totals import sum_dump
from r1hpc.base.errors import StateError
from tests.accounting.dumps import CAUSES, ODD_COLUMNS, SHARES, UNIT, Truth, _days, wait_of, write_dump
from tests.accounting.sacct_rows import by_columns, by_rows, clock_of, row, text_of

HOUR = 3600


@pytest.fixture(scope="module")
def berlin() -> Iterator[None]:
    with clock_of("Europe/Berlin"):
        yield


@pytest.fixture(scope="module")
def dump(berlin: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """Over a year of three clusters, so over both changes of the clock."""
    path = tmp_path_factory.mktemp("dump") / "dump.txt"
    return path, write_dump(path, 6_000, 21, ODD_COLUMNS, every_s=12_000, odd=True, keep=True)


def groups_of(path: Path, *by: str, **selected: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        return sum_dump(file, "dump.txt", Selection(by=by, shares=SHARES, **selected))


def value(row: dict[str, str], kind: str, key: str) -> str:
    if key == "gpu":
        return kind
    state = row["State"].split(" ")[0]
    if key == "cause":
        return CAUSES.get(state, state.lower())
    return state if key == "state" else row["QOS" if key == "qos" else key.title()]


@pytest.mark.parametrize(
    "by",
    [
        *(("user",), ("account",), ("partition",), ("qos",), ("cluster",), ("gpu",), ("state",), ("cause",)),
        *(("month",), ("day",), ("user", "month"), ("month", "gpu", "cause"), ("day", "month", "account")),
    ],
)
def test_every_group_is_exact_to_the_second(dump: tuple[Path, Truth], by: tuple[str, ...]) -> None:
    path, truth = dump
    seconds, starts = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for cells, start, elapsed, units, kind in truth.records or ():
        is_split = {"day", "month"} & set(by)
        days = list(_days(start, start + elapsed)) if is_split and elapsed else []
        local = datetime.fromtimestamp(start).date().isoformat()
        for at, (day, part) in enumerate(days or [(local, elapsed)]):
            times = {"day": day, "month": day[:7]}
            key = tuple(times[name] if name in times else value(cells, kind, name) for name in by)
            seconds[key] += units * part
            starts[key] += at == 0
    hours = groups_of(path, *by)
    rows = {tuple(each[name] for name in by): each for each in hours["groups"]}
    assert set(rows) == set(seconds)
    assert {key: round(each["gpu_hours"] * UNIT * HOUR) for key, each in rows.items()} == seconds
    assert {key: each["starts"] for key, each in rows.items()} == {key: starts[key] for key in rows}
    assert round(hours["all"]["gpu_hours"] * UNIT * HOUR) == truth.gpu_seconds == sum(seconds.values())
    assert hours["all"]["starts"] == truth.num_records
    assert sum(each["share"] for each in rows.values()) == pytest.approx(1)


def test_groups_are_ranked_and_months_in_order(dump: tuple[Path, Truth]) -> None:
    path, _ = dump
    hours = [each["gpu_hours"] for each in groups_of(path, "account")["groups"]]
    assert hours == sorted(hours, reverse=True)
    assert len(hours) == 37
    rows = groups_of(path, "account", "month")["groups"]
    accounts = list(dict.fromkeys(each["account"] for each in rows))
    assert accounts == [each["account"] for each in groups_of(path, "account")["groups"]]
    months = [each["month"] for each in rows if each["account"] == accounts[0]]
    assert months == sorted(months)
    assert len(months) > 11


def test_a_selection_is_split_too(dump: tuple[Path, Truth]) -> None:
    path, _ = dump
    first, last = (datetime(2025, month, 10).timestamp() for month in (3, 5))
    hours = groups_of(path, "month", "user", start=first, end=last, account="lab1,lab2")
    assert {each["month"] for each in hours["groups"]} == {"2025-03", "2025-04", "2025-05"}
    assert hours["all"]["gpu_hours"] == pytest.approx(hours["total"])
    by_user: dict[str, float] = defaultdict(float)
    for each in hours["groups"]:
        by_user[each["user"]] += each["gpu_hours"]
    assert by_user == pytest.approx(hours["by_user"])


@pytest.mark.parametrize("by", [("partition",), ("user", "qos")])
def test_waits_are_those_of_the_starts(tmp_path: Path, by: tuple[str, ...]) -> None:
    with clock_of("UTC"):
        path = tmp_path / "dump.txt"
        truth = write_dump(path, 3000, 5, keep=True)
        waits = defaultdict(list)
        for cells, start, _, _, kind in truth.records or ():
            waits[tuple(value(cells, kind, key) for key in by)].append(wait_of(start))
        with path.open("rb") as file:
            hours = sum_dump(file, "dump.txt", Selection(by=by))
    for each in hours["groups"]:
        expected = sorted(waits.pop(tuple(each[key] for key in by)))
        assert each["wait_p50_s"] == statistics.median(expected)
        tenths = statistics.quantiles(expected, n=10, method="inclusive") if len(expected) > 1 else expected
        assert each["wait_p90_s"] == pytest.approx(tenths[-1])
    assert not waits


def test_a_wait_begins_when_the_job_may_start_and_an_unknown_one_is_none() -> None:
    times = (
        ("2026-05-01T20:00:00", "2026-05-01T21:30:00"),
        ("2026-05-01T21:00:00", "Unknown"),
        ("Unknown", "None"),
        ("2026-05-01T23:00:00", "2026-05-01T23:00:00"),  # after the start: a clock is wrong
    )
    lines = [f"{row(job=str(at))}|{submit}|{eligible}" for at, (submit, eligible) in enumerate(times)]
    text = text_of(*lines).replace("AllocTRES\n", "AllocTRES|Submit|Eligible\n", 1)
    for read in (by_columns, by_rows):
        (group,) = read(text, by=("partition",))["groups"]
        assert (group["starts"], group["wait_p50_s"]) == (4, (1800 + 3600) / 2)
        (group,) = read(text_of(row()), by=("partition",))["groups"]
        assert (group["starts"], group["wait_p50_s"], group["wait_p90_s"]) == (1, None, None)


def test_a_job_with_several_types_of_gpu_is_split() -> None:
    text = text_of(
        row(job="1", elapsed="3600", AllocTRES="gres/gpu:a100=2,gres/gpu:h100=1,gres/gpu=4"),
        row(job="2", elapsed="1800", AllocTRES="cpu=4", User="bob"),
    )
    hours = by_columns(text, by=("gpu",))
    types = {each["gpu"]: each["gpu_hours"] for each in hours["groups"]}
    assert types == {"a100": 2, "h100": 1, "unknown": 1, "none": 0}
    assert (hours["all"]["gpu_hours"], hours["all"]["starts"]) == (4, 2)


def test_without_a_job_there_is_no_group_and_a_column_that_is_needed_is_named() -> None:
    hours = by_columns(text_of(), by=("user", "month"))
    assert (hours["groups"], hours["all"]["starts"], hours["all"]["gpu_hours"]) == ([], 0, 0)
    text = "JobID|Start|ElapsedRaw|AllocTRES\n7|2026-05-01T10:00:00|60|gres/gpu=1\n"
    for by, column in (("cause", "state"), ("qos", "qos"), ("user", "user")):
        with pytest.raises(StateError, match=f"no column {column} in its first line"):
            sum_dump(io.BytesIO(text.encode()), "dump.txt", Selection(by=(by,)))
