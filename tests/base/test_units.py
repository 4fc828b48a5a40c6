"""Slurm's notations read and written, and numbers for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_bytes, format_duration, format_hours, format_time, gpu_hours, parse_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300),
        ("0", 0),
        ("5:30", 330),
        ("12:00:00", 43200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:15", 131415),
        ("100:00:00", 360000),
        (" 5 ", 300),
    ],
)
def test_parse_time(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "x", "1:2:3:4", "-5", "1.5", "1-", "1:", "5m", "1-2-3", "UNLIMITED", "٣:"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="is not one of M, M:S"):
        parse_time(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "1-" + "9" * 400, "0:0:" + "9" * 400, "50000-0"])
def test_a_time_that_slurm_cannot_count(text: str) -> None:
    with pytest.raises(UsageError, match="is over 49,711 days: give a limit such as"):
        parse_time(text)


@given(st.integers(0, 10**9))
def test_format_time_is_read_back(seconds: int) -> None:
    assert parse_time(format_time(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (9.94, "9.9 s"),
        (12, "12 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**30, "3.0 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_gpu_hours() -> None:
    assert gpu_hours(32, 5400) == 48


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0, "0"),
        (12345.6, "12,346"),
        (123.45, "123.5"),
        (1.234, "1.23"),
        (0.0123, "0.012"),
        (0.00123, "0.0012"),
        (7e-5, "0.00007"),
        (-0.0000714, "-0.000071"),
        (0.00999, "0.01"),
    ],
)
def test_hours_as_people_read_them(hours: float, text: str) -> None:
    assert format_hours(hours) == text
