"""Compose and parse a completion: `<think>...</think><answer>...</answer>`.

Takes time linear in the length of the text; no regular expression that could backtrack.
"""

from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Parts:
    """The parts of a completion. `answer` is None unless there is exactly one."""

    thinking: str | None
    answer: str | None
    well_formed: bool


def compose(thinking: str, answer: str) -> str:
    """Return a well-formed completion."""
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def take_apart(text: str, truncated: bool = False, boxed: bool = False) -> Parts:
    """Split a completion into thinking and answer.

    Well-formed: each tag once, in order, nothing but blanks around the two blocks, an answer that is not
    blank, and an end that the model chose itself (not truncated). An answer counts only after the thinking
    has ended, if there is any. It must be the only one there: several would be guessing.

    With `boxed` the answer is the content of the last \\boxed{...} after the thinking; a completion that
    ended and has one is well-formed.
    """
    thinking, said = _after_thinking(text)
    if boxed:
        box = last_boxed(said)
        found = box.content if box is not None and box.content else None
        return Parts(thinking, found, found is not None and not truncated)
    answer = None
    if said.count("<answer>") == said.count("</answer>") == 1:
        start, end = said.find("<answer>") + len("<answer>"), said.find("</answer>")
        answer = said[start:end] if start <= end else None
    before, opening, _ = text.partition("<think>")
    if opening and "answer>" in before:
        answer = None
    is_plain = answer is not None and [text.count(tag) for tag in TAGS] == [1, 1, 1, 1]
    if thinking is None or answer is None or not is_plain or truncated or not answer.strip(_SPACE):
        return Parts(thinking, answer, False)
    outside = before + said[: said.find("<answer>")] + said[said.find("</answer>") + len("</answer>") :]
    return Parts(thinking, answer, not outside.strip(_SPACE))


def _after_thinking(text: str) -> tuple[str | None, str]:
    """Return the thinking and the text after it; the text is empty if the thinking has not ended. Only its
    end tag counts, because a chat template may have opened it in the prompt."""
    thinking, end, said = text.rpartition("</think>")
    if "<think>" in said:
        return (thinking if end else None), ""
    return (thinking.partition("<think>")[2] if "<think>" in thinking else thinking) if end else None, said


@dataclass(frozen=True)
class Boxed:
    """Position and content of a \\boxed."""

    start: int
    content: str
    end: int
    """Index of the text after it."""


def last_boxed(text: str) -> Boxed | None:
    """Return the last \\boxed{...} of a text, with braces counted; None if none is closed."""
    return _last_closed(text, "\\boxed{")


def out_of_box(answer: str) -> str:
    """Return the content of an answer that is just one box; any other answer unchanged."""
    box = boxed_in_solution(answer)
    return box.content if box is not None and box.start == 0 and box.end == len(answer) else answer


def boxed_in_solution(text: str) -> Boxed | None:
    """Return last_boxed, or MATH's \\fbox{...} and `\\boxed 5$` (Hendrycks et al., arXiv 2103.03874)."""
    found = last_boxed(text) or _last_closed(text, "\\fbox{")
    if found is not None:
        return found
    before, mark, after = text.rpartition("\\boxed ")
    held = after.partition("$")[0].partition("\n")[0]
    content = held.strip(_SPACE)
    return Boxed(len(before), content, len(before + mark + held)) if mark and content else None


def _last_closed(text: str, opening: str) -> Boxed | None:
    start = text.rfind(opening)
    if start < 0:
        return None
    depth, first = 1, start + len(opening)
    for end in range(first, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return Boxed(start, text[first:end].strip(_SPACE), end + 1)
    return None


def without_tags(text: str) -> str:
    """Replace each tag in `text` by a blank."""
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text
