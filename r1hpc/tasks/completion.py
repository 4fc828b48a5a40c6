"""The form of a completion: `<think>...</think><answer>...</answer>`, and how it is taken apart.

Linear in the length of the text; no regular expression that could backtrack.
"""

from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Parts:
    """What a completion says. `answer` is None where there is not exactly one."""

    thinking: str | None
    answer: str | None
    well_formed: bool


def compose(thinking: str, answer: str) -> str:
    """A well-formed completion."""
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def take_apart(text: str, truncated: bool = False) -> Parts:
    """Thinking and answer of a completion.

    Well-formed: each tag once, in order, nothing but blanks around the two blocks, an answer that is not
    blank, and an end that the model chose itself (not truncated). An answer counts wherever there is
    exactly one pair of answer tags: several answers would be guessing.
    """
    thinking, answer = _between(text, "<think>", "</think>"), _between(text, "<answer>", "</answer>")
    if thinking is None or answer is None or truncated or not answer.strip(_SPACE):
        return Parts(thinking, answer, False)
    middle, opening = text.find("</think>") + len("</think>"), text.find("<answer>")
    end = text.find("</answer>") + len("</answer>")
    outside = text[: text.find("<think>")] + text[middle:opening] + text[end:]
    return Parts(thinking, answer, middle <= opening and not outside.strip(_SPACE))


def without_tags(text: str) -> str:
    """`text` with a blank in place of each tag."""
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text


def _between(text: str, opening: str, closing: str) -> str | None:
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.find(opening) + len(opening), text.find(closing)
    return text[start:end] if start <= end else None
