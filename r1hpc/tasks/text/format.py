"""Turn a question into a model's tokens, and its tokens into thinking and answer.

    ids = prompt_ids(tokenizer, form, question, where, most)    # PromptForm puts the text around it
    (text,) = decode(tokenizer, [sampled], stops)
    parts = take_apart(form.said(text))                         # <think>...</think><answer>...</answer>

A template may open the thinking itself (DeepSeek-R1's ends on `<think>`), and model.open_thinking makes any
do so. The tag then belongs to the prompt, and is put before the model's text. A completion is taken apart in
time linear in its length; no regular expression that could backtrack. The verifier's process imports this
file too: nothing heavy here. tokenizer.py loads tokenizers and forms.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.plan.model.chat_template import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_OPEN = TAGS[0]
_SPACE = " \t\r\n"


class TooLongError(ConfigError):
    """A prompt of more tokens than rollout.max_prompt_length."""


@dataclass(frozen=True)
class SpecialIds:
    """`pad` fills rows, `eos` ends a taught text."""

    pad: int
    eos: int
    also: tuple[int, ...] = ()
    """Further tokens that end a completion: chat models have several."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Return every token that ends a completion."""
        return (self.eos, *self.also)


@dataclass(frozen=True)
class PromptForm:
    """The text around a prompt. By default there is none."""

    template: ChatTemplate | None = None
    system: str | None = None
    begin: str = ""
    """Without a template: the token, as text, that the model expects before every text."""
    open_thinking: bool = False

    def prompt(self, text: str) -> str:
        """Return the complete prompt with special tokens; UsageError if the chat template refuses it."""
        return self.conversation([{"role": "user", "content": text}])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for an answer to the last of `messages`; without a template they are joined."""
        if self.template is None:
            text = "".join(message["content"] for message in messages)
            text = text if text.startswith(self.begin) else self.begin + text
        else:
            first = [] if self.system is None else [{"role": "system", "content": self.system}]
            try:
                text = self.template.render([*first, *messages], for_answer=True)
            except ValueError as error:
                raise UsageError(
                    f"{error}; model.chat_template=none gives prompts to the model as they are"
                ) from None
        return text + _OPEN if self.open_thinking and not _opens(text) else text

    def completion(self, text: str) -> str:
        """Return the text after the prompt in a demonstration: without the tag that the prompt opens."""
        return text.lstrip().removeprefix(_OPEN) if self.opens_thinking else text

    def said(self, text: str) -> str:
        """Return the model's text, with the tag that the prompt opened for it."""
        return _OPEN + text if self.opens_thinking else text

    @cached_property
    def is_plain(self) -> bool:
        """True if it leaves prompts and completions unchanged."""
        return self == PromptForm()

    @cached_property
    def id(self) -> str:
        source = self.template and [self.template.source, *sorted(self.template.variables.items())]
        return json.dumps([source, self.system, self.begin, self.open_thinking])

    @cached_property
    def opens_thinking(self) -> bool:
        """True if a prompt ends in the tag that opens the thinking."""
        return _opens(self.prompt("?"))


def _opens(prompt: str) -> bool:
    return prompt.rstrip().endswith(_OPEN)


def prompt_ids(
    tokenizer: "tokenizers.Tokenizer", form: PromptForm, prompt: str, where: str, most: int
) -> tuple[int, ...]:
    """Return the tokens of a prompt in the model's prompt form.

    `where` is the line of its file, for errors; empty: it is from none. Raise TooLongError if it has more
    than `most` tokens, UsageError for an unknown character, or if the chat template refuses the prompt.
    """
    at = where and f"{where}: "
    try:
        ids = tuple(encode(tokenizer, form.prompt(prompt)))
    except UsageError as error:
        raise UsageError(f"{at}{error}") from None
    if len(ids) > most:
        shorter = "; or shorten task.options.template; task.drop_longer=true leaves out a task's longer rows"
        raise TooLongError(
            f"{at}a prompt has {len(ids)} tokens: raise rollout.max_prompt_length, now {most} "
            f"({prompt!r:.80}){shorter if where else ''}"
        )
    return ids


def encode(tokenizer: "tokenizers.Tokenizer", text: str) -> list[int]:
    """Return the IDs of `text` without special tokens around it; UsageError for an unknown character."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    # The library raises plain Exception for a missing token.
    except Exception as error:
        unknown = sorted({char for char in text if not _known(tokenizer, char)})
        raise UsageError(
            f"the tokenizer has no token for {unknown or error} in {text[:80]!r}; "
            "the built-in `characters` holds digits, + - * / = , : ? ( ) and space: give model.tokenizer"
        ) from None
    return ids


def _known(tokenizer: "tokenizers.Tokenizer", char: str) -> bool:
    is_text = not "\ud800" <= char <= "\udfff"  # half a surrogate pair, as JSON may escape one
    return is_text and tokenizer.token_to_id(char) is not None


def decode(
    tokenizer: "tokenizers.Tokenizer", rows: Sequence[Sequence[int]], stops: Sequence[int] = ()
) -> list[str]:
    """Return the model's text for each row of IDs: without special tokens, but with the tags.

    Tags are often added to a vocabulary as special tokens. The library's skip_special_tokens would remove
    them too, and the answer could not be judged. `stops`, which end a completion, are left out too: some
    tokenizers hold their end as a common token.
    """
    added = tokenizer.get_added_tokens_decoder().items()
    silent = {index for index, token in added if token.special} | set(stops)
    silent -= {tokenizer.token_to_id(tag) for tag in TAGS}
    spoken = [[index for index in row if index not in silent] for row in rows]
    texts: list[str] = tokenizer.decode_batch(spoken, skip_special_tokens=False)
    return texts


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
    start: int
    content: str
    end: int
    """Index of the text after it."""


def last_boxed(text: str) -> Boxed | None:
    """Return the last \\boxed{...} of a text, with braces counted; None if none is closed."""
    return _last_closed(text, "boxed")


def out_of_box(answer: str) -> str:
    """Return the content of an answer that is just one box; any other answer unchanged."""
    box = boxed_in_solution(answer)
    return box.content if box is not None and box.start == 0 and box.end == len(answer) else answer


def boxed_in_solution(text: str) -> Boxed | None:
    """Return last_boxed, or MATH's \\fbox{...} and `\\boxed 5$` (Hendrycks et al., arXiv 2103.03874)."""
    found = last_boxed(text) or _last_closed(text, "fbox")
    if found is not None:
        return found
    before, mark, after = text.rpartition("\\boxed ")
    held = after.partition("$")[0].partition("\n")[0]
    content = held.strip(_SPACE)
    return Boxed(len(before), content, len(before + mark + held)) if mark and content else None


def _last_closed(text: str, command: str) -> Boxed | None:
    openings = list(re.finditer(rf"\\{command}\s*\{{", text))
    if not openings:
        return None
    depth, start, first = 1, openings[-1].start(), openings[-1].end()
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
