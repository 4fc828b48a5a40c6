"""Sums by columns equal those by rows, whatever sacct printed and whatever became of it."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r1hpc.accounting import sacct_totals
from tests.accounting.sacct_rows import HEADER, ZONES, by_columns, by_rows, clock_of, outcome, row

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
BILLED = [
    b"1||ada|lab|gpu|normal|RUNNING|2026-03-29T01:59:59|1|1|billing=4,node=1",
    b"2||bob|lab|gpu|normal|RUNNING|2026-03-29T01:59:59|0|1|billing=4,node=1",
]
"""Whoever had nothing of what is billed is not named."""
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
@example(BILLED, b"\n", ZONES[0], 1, {})
@given(st.lists(LINES, max_size=12), ENDS, st.sampled_from(ZONES), SIZES, SELECTIONS)
def test_columns_and_rows_agree_on_lines_that_were_damaged(
    lines: list[bytes], end: bytes, zone: str, size: int, selected: dict[str, Any]
) -> None:
    """The same sums, or the same error about the same line."""
    check_that_both_agree(end.join([SHORT.encode(), *lines]), zone, size, selected)
