"""Each kind of shape says what is wrong, and where; what a record may lack or have beside is no mistake."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.records import Amount, Count, Time, mistake


class Colour(StrEnum):
    red = "red"


class Mark(NamedTuple):
    size: int
    name: str


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]
    mark: Mark | None = None


class Line(TypedDict):
    time: Time
    count: NotRequired[Count]
    inner: NotRequired[Inner | None]
    shares: NotRequired[dict[str, Amount]]
    colour: NotRequired[Colour]
    kind: NotRequired[Literal["a", "b"]]
    flag: NotRequired[bool]


WHOLE = {
    "time": 1,
    "count": 3,
    "inner": {"names": ["x"], "mark": [1, "m"]},
    "shares": {"a": 0.5},
    "colour": "red",
    "kind": "b",
    "flag": False,
    "of a later version": [],
}


def test_a_record_of_the_shape_is_none() -> None:
    assert mistake(WHOLE, Line) is None
    assert mistake({"time": 1.5}, Line) is None
    assert mistake({"time": 0, "inner": None}, Line) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"time": "noon"}, "time is 'noon', not a number"),
        ({"time": "\n"}, "time is '\\n', not a number"),
        ({"time": True}, "time is True, not a number"),
        ({"time": float("nan")}, "time is nan, which cannot be"),
        ({"time": 1e11}, "time is 100000000000.0, which cannot be"),
        ({"count": -1}, "count is -1, which cannot be"),
        ({"count": 1.5}, "count is 1.5, not a whole number"),
        ({"count": 10**5000}, "count is a number of too many digits, not a whole number"),
        ({"count": None}, "count is None, not a whole number"),
        ({"inner": {}}, "inner.names is missing"),
        ({"inner": []}, "inner is a list, not an object"),
        ({"inner": {"names": ["a", 2]}}, "inner.names[1] is 2, not text"),
        ({"inner": {"names": [], "mark": [1]}}, "inner.mark is a list, not a list of 2"),
        ({"shares": {"a": {}}}, "shares.'a' is an object, not a number"),
        ({"colour": "blue"}, "colour is 'blue', not one of red"),
        ({"kind": ["a"]}, "kind is a list, not one of a, b"),
        ({"flag": 1}, "flag is 1, not true or false"),
        ({"inner": {"names": ["\ud800"]}}, "inner.names[0] is text that is not Unicode"),
    ],
)
def test_the_first_mistake_is_named_with_its_place(changed: dict[str, Any], words: str) -> None:
    assert mistake({**WHOLE, **changed}, Line) == words


def test_what_is_missing_is_named() -> None:
    assert mistake({"count": 3}, Line) == "time is missing"
    assert mistake([], Line) == "is a list, not an object"


def test_a_long_or_hostile_value_is_shown_short() -> None:
    said = mistake({"time": "\x1b[31m" + "x" * 5000}, Line)
    assert said is not None
    assert len(said) < 100
    assert "\x1b" not in said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WHOLE, "x"]), inner),
)


@given(VALUES)
def test_whatever_comes_is_judged(value: Any) -> None:
    said = mistake(value, Line)
    assert said is None or said.isprintable() or "\n" not in said
    if said is None:
        assert 0 <= value["time"] + value.get("count", 0) < 1e17
