"""Rows as sacct prints them, and the two ways to sum them: by columns, as a large file, and by rows."""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from r1hpc.accounting import account
from r1hpc.accounting.account import hours_of_lines
from r1hpc.accounting.hours import Selection
from r1hpc.accounting.sacct_totals import sum_dump
from r1hpc.base.errors import StateError, UsageError

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


def by_columns(text: str | bytes, **selected: Any) -> dict[str, Any]:
    content = text if isinstance(text, bytes) else text.encode()
    return sum_dump(io.BytesIO(content), "dump.txt", Selection(**selected))


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


def outcome(read: Callable[..., dict[str, Any]], content: bytes, **selected: Any) -> Any:
    try:
        return in_seconds(read(content, **selected))
    except (StateError, UsageError) as error:
        return str(error)


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
