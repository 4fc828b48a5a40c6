"""What counts as well-formed, and which answer is taken."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.tasks.text.format import TAGS, Parts, compose, take_apart

_PLAIN = st.text(st.characters(blacklist_characters="<>"))


@given(_PLAIN, _PLAIN)
def test_composed_comes_apart(thinking: str, answer: str) -> None:
    parts = take_apart(compose(thinking, answer))
    assert (parts.thinking, parts.answer) == (thinking, answer)
    assert parts.well_formed == bool(answer.strip(" \t\r\n"))


@given(st.lists(st.one_of(st.sampled_from([*TAGS, "1", " "]), _PLAIN), max_size=12).map("".join))
def test_well_formed_is_each_tag_once_in_order(text: str) -> None:
    parts = take_apart(text)
    if parts.well_formed:
        assert [text.count(tag) for tag in TAGS] == [1, 1, 1, 1]
        assert parts.thinking is not None
        assert parts.answer is not None
        assert "".join(text.split()) == "".join(compose(parts.thinking, parts.answer).split())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),
        ("x<think></think><answer>4</answer>", "4"),
        ("<think></think><answer>4</answer>5", "4"),
        ("<think></think>well<answer>4</answer>", "4"),
        ("<answer>4</answer><think></think>", None),
        ("<think><answer>4</answer></think>", None),
        ("<think>hm <answer>4</answer>", None),
        ("<think>a</think><think>hm <answer>4</answer>", None),
        ("I guess <answer>3</answer></think><answer>4</answer>", "4"),
        ("<think></think><answer> </answer>", " "),
        ("<think>inside <answer> </answer> tags</think><answer>4</answer>", "4"),
        ("<think><answer>3</answer></think><answer>4</answer>", "4"),
        ("<think><answer>3</answer><answer>4</answer></think>", None),
        ("<think><answer>3</answer></think><answer>4", None),
        ("<answer>1</answer><think>t</think><answer>2</answer>", None),
        ("<think></think><answer>4", None),
        ("<think></think><answer>4</answer><answer>5</answer>", None),
        ("<think></think><answer><answer>4</answer></answer>", None),
        ("</answer><think></think><answer>", None),
        ("<Think></Think><Answer>4</Answer>", None),
        ("", None),
    ],
)
def test_ill_formed(text: str, answer: str | None) -> None:
    parts = take_apart(text)
    assert not parts.well_formed
    assert parts.answer == answer


def test_blanks_between_the_blocks_do_no_harm() -> None:
    assert take_apart(" <think>a</think>\n\n<answer>4</answer>\n").well_formed


def test_a_truncated_completion_is_not_well_formed_but_its_answer_counts() -> None:
    parts = take_apart(compose("", "4"), truncated=True)
    assert not parts.well_formed
    assert parts.answer == "4"


def test_megabytes_are_read_in_linear_time() -> None:
    for text in ("<think>" * 10**6, "<" * 10**7, "<answer>" + "x" * 10**7, compose("a" * 10**7, "1")):
        started = time.process_time()
        take_apart(text)
        assert time.process_time() - started < 30, "quadratic, it would be hours"


@pytest.mark.parametrize(
    "text", [r"<think>so \boxed{7}, but wait", r"<think>so \boxed{7}.", r"<think>\boxed{7}</thin"]
)
def test_a_box_in_a_thinking_that_has_not_ended_is_no_answer(text: str) -> None:
    for truncated in (True, False):
        assert take_apart(text, truncated, boxed=True) == Parts(None, None, False)
    assert take_apart(r"so \boxed{7}", boxed=True).answer == "7", "a model that does not think"
