"""Tables and paragraphs on terminals of any width."""

import pytest

from r1hpc.base.tables import bar, coloured, format_table, terminal_width, wrap

_HEADINGS = ("#", "cause", "start", "duration", "steps")
_ROWS = [
    ("1", "node_fail", "11-26 15:00:00", "12 min 40 s", "1-25"),
    ("2", "running", "11-26 15:20:00", "9 s", "16-40"),
]


def columns(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize(
    ("given", "width"), [("80", 80), ("300", 300), ("7", 40), ("", 100), ("x", 100), ("-5", 100)]
)
def test_without_a_terminal_columns_says_how_wide(
    given: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", given)
    assert terminal_width() == width


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_where_a_table_has_no_room_its_rows_become_paragraphs(width: int) -> None:
    text = format_table(_HEADINGS, _ROWS, right={0, 3}, width=width, indent="  ")
    assert columns(text) <= width
    for row in _ROWS:
        assert all(cell in text for cell in row), "nothing is cut, and no value broken over two lines"


def test_a_log_keeps_its_table_whatever_it_holds() -> None:
    rows = [("x" * 90, "running", "", "", "")]
    assert format_table(_HEADINGS, rows, width=100).splitlines()[1].startswith("x" * 90 + "  running")


def test_paragraphs_and_bars_follow_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert 50 < columns(wrap("word " * 100)) <= 60
    assert (len(bar(1, 1)), len(bar(1, 2))) == (10, 5)
    monkeypatch.setenv("COLUMNS", "400")
    assert 110 < columns(wrap("word " * 100)) <= 120
    assert len(bar(1, 1)) == 30


def test_states_have_colours_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "demo: failed  (why)\n  1  finished  it finished"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    red, green = "\x1b[31mfailed\x1b[0m", "\x1b[32mfinished\x1b[0m"
    assert coloured(text) == f"demo: {red}  (why)\n  1  {green}  it finished"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured(text) == text
