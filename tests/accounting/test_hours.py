"""GPU-hours by day, where a day has not 24 hours."""

import time
from collections.abc import Iterator

import pytest

from r1hpc.accounting.hours import split_days


@pytest.fixture
def _berlin() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_berlin")
def test_days_of_23_and_25_hours() -> None:
    spring = split_days(1774652400.0, 1774652400.0 + 3 * 86400)  # 2026-03-28T00:00 in Berlin
    assert [(day, s / 3600) for day, s in spring][:3] == [
        ("2026-03-28", 24),
        ("2026-03-29", 23),
        ("2026-03-30", 24),
    ]
    autumn = dict(split_days(1792792800.0, 1792792800.0 + 2 * 86400))  # 2026-10-24T00:00
    assert autumn["2026-10-25"] == pytest.approx(24 * 3600)
    assert sum(autumn.values()) == pytest.approx(2 * 86400)
