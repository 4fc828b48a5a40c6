"""Format a prompt for a model: by its chat template, or unchanged after the token that begins a text.

A template may open the thinking itself (DeepSeek-R1's ends on `<think>`), and model.open_thinking makes any
do so. The tag then belongs to the prompt, and is put before the model's text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers

from r1hpc.base.errors import UsageError
from r1hpc.base.files import parse_json
from r1hpc.config.paths import has_own_template
from r1hpc.config.plugins import template_file
from r1hpc.config.schema.run import ModelConfig
from r1hpc.plan.model.chat_template import ChatTemplate, has_template, load_template
from r1hpc.tasks.grading.completion import TAGS

_OPEN = TAGS[0]
_AUTO = "auto"


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
        """Return an id made from the content of the form."""
        source = self.template and [self.template.source, *sorted(self.template.variables.items())]
        return json.dumps([source, self.system, self.begin, self.open_thinking])

    @cached_property
    def opens_thinking(self) -> bool:
        """True if a prompt ends in the tag that opens the thinking."""
        return _opens(self.prompt("?"))


def prompt_form(
    model: ModelConfig, tokenizer: tokenizers.Tokenizer, folder: Path | None, code: Path | None = None
) -> PromptForm:
    """Return the form set by model.chat_template, model.system_prompt and model.open_thinking.

    `folder` is that of the tokenizer's files; None: it is the built-in one. `code` is the frozen code of a
    run inspected from outside, with its copy of a custom template. Raise UsageError if there is no such
    template, it does not compile, or for a system prompt without a template.
    """
    template = None
    if has_own_template(model):
        template = load_template(template_file(model, code), folder)
    elif model.chat_template == _AUTO and folder is not None and has_template(folder):
        template = load_template(folder)
    if model.system_prompt is not None and template is None:
        raise UsageError(
            "model.system_prompt needs a chat template, and there is none: leave it out, and write it into "
            "the task's template"
        )
    begin = "" if template is not None or folder is None else _begin(tokenizer, folder)
    return PromptForm(template, model.system_prompt, begin, model.open_thinking)


def as_trained(trained: ModelConfig, folder: Path) -> ModelConfig:
    """Return the settings to ask a run's exported folder as the run asked; the folder has all else."""
    return ModelConfig(
        path=str(folder),
        attn_implementation=trained.attn_implementation,
        chat_template="none" if trained.chat_template == "none" else _AUTO,
        system_prompt=trained.system_prompt,
        open_thinking=trained.open_thinking,
    )


def _begin(tokenizer: tokenizers.Tokenizer, folder: Path) -> str:
    """Return the token before every text: by `add_bos_token`, else what the tokenizer itself puts there."""
    named = named_tokens(folder)
    if named.get("add_bos_token") is False:
        return ""
    frame = tokenizer.encode("", add_special_tokens=True).tokens
    before = "".join(takewhile(lambda token: token != named.get("eos_token"), frame))
    return before or (str(named.get("bos_token", "")) if named.get("add_bos_token") else "")


def named_tokens(folder: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer.json say about tokens: `eos_token` etc. as text, and flags.
    Raise UsageError if one of them is no JSON object."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        try:
            content = parse_json(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON ({error}); restore it") from None
        if not isinstance(content, dict):
            raise UsageError(f"{path} must hold one JSON object; restore it")
        found |= {key: _content(value) for key, value in content.items() if value is not None}
    return found


def _content(token: Any) -> Any:
    """Return the text of a token, which Hugging Face writes as a string or as an object with `content`."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _opens(prompt: str) -> bool:
    return prompt.rstrip().endswith(_OPEN)
