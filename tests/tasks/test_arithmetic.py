"""The parser reads what Python reads, refuses the rest, and refuses it at once."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.tasks.grading.arithmetic import MAX_DEPTH, RefusedError, numbers, parse, value

_LEAF = st.integers(0, 999).map(str)
_EXPRESSION = st.recursive(
    _LEAF,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=10,
)


@given(_EXPRESSION)
def test_a_value_is_what_python_says(text: str) -> None:
    """eval is safe here: the text is ours. Fractions, so that division is exact."""
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in _split(text))
    try:
        wanted = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            value(parse(text))
        return
    assert value(parse(text)) == wanted


def _split(text: str) -> list[str]:
    for mark in "+-*/()":
        text = text.replace(mark, f" {mark} ")
    return text.split()


@given(_EXPRESSION)
def test_numbers_counts_each_integer(text: str) -> None:
    assert sorted(numbers(parse(text)).elements()) == sorted(
        int(part) for part in _split(text) if part.isdigit()
    )


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
        parse(text, algebra=True)
    except RefusedError:
        pass


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "+", "1+", "(1", "1)", "()", "1 2", "-1", "+1", "1.5", "007", "1e3", "0x1", "1_000"),
        *("99**98**97", "2^3", "x", "abs(1)", "1,2", "1;2", "1+2=3", "\x001", "1\x00"),
        *(
            "\u0661+\u0662",
            "\uff11",
            "\u00b2",
            "1\u00a0+1",
            "\ud800",
            "__import__('os')",
            "{0.__class__}",
            "%s",
        ),
        *("9" * 31, "1+" * 300 + "1", "(" * 100_000, "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)),
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        parse(text)


@pytest.mark.parametrize(
    "text", ["x**2 + 1", "2*sin(x)", "-x", "--1", "2**-3", ".5 + 1.", "3^2", "a_1*b", "log(x)/x", "-(-(-1))"]
)
def test_algebra_is_read_on_request(text: str) -> None:
    parse(text, algebra=True)
    with pytest.raises(RefusedError):
        parse(text)


@pytest.mark.parametrize(
    "text", ["-" * 400 + "1", "2**" * 100 + "2", "sin(" * 60 + "x" + ")" * 60, "x.y", "x[0]", "x'"]
)
def test_algebra_is_bounded_too(text: str) -> None:
    with pytest.raises(RefusedError):
        parse(text, algebra=True)


def test_the_deepest_that_is_read_is_read() -> None:
    depth = MAX_DEPTH
    assert value(parse("(" * depth + "1" + ")" * depth)) == 1
