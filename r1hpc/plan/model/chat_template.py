"""Render messages with a chat template as transformers does, for prompts (tasks/) and datasets (corpus/).

The template is Jinja in a sandbox. A message cannot create a special token: one that spells a special token
is refused, except for the tags <think> and <answer>.
"""

import contextlib
import datetime
import functools
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.files import parse_json

_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
_LONGEST_S = 10.0
_SPELLED = frozenset(("<think>", "</think>", "<answer>", "</answer>"))
"""Prompts contain these by name, even if a vocabulary has them as special tokens; they end no turn."""
_DATE = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
"""The date given to a template that needs one: with today's, prompts would change after a resume, and answers
of two days would not be comparable."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template and the tokens it may use by name. `strftime_now` is undefined for a template that
    tests for it; any other gets _DATE."""

    source: str
    template: Any
    variables: Mapping[str, str]
    special: tuple[str, ...]

    def render(self, messages: Sequence[Mapping[str, Any]], *, for_answer: bool = False) -> str:
        """Return the conversation as one text; `for_answer`: up to where the assistant begins. Raise
        ValueError if one is not a message or spells a special token, or the template refuses it."""
        for message in messages:
            self._check(message)
        try:
            with _bounded():
                return str(
                    self.template.render(
                        messages=messages, add_generation_prompt=for_answer, **self.variables
                    )
                )
        except Exception as error:  # whatever a template raises is this record's fault
            raise ValueError(f"the chat template refuses the messages ({error})") from None

    def end_of_turn(self) -> str | None:
        """Return the special token the template puts after the assistant's text; None if none."""
        said = "answer"
        try:
            text = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}])
        except ValueError:
            return None
        after = text[text.rfind(said) + len(said) :].lstrip()
        ends = [token for token in self.special if after.startswith(token)]
        return max(ends, key=len, default=None)

    def _check(self, message: Mapping[str, Any]) -> None:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError("a message without role and content")
        text = json.dumps(message["content"], ensure_ascii=False)
        for token in self.special:
            if token in text and token not in _SPELLED:
                raise ValueError(f"a message spells the special token {token!r}")


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise TimeoutError inside the block after _LONGEST_S seconds. Only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"no text after {_LONGEST_S:g} s: it may be endless")

    before, left = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, _LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


@functools.lru_cache(maxsize=8)
def load_template(path: Path, tokenizer: Path | None = None) -> ChatTemplate:
    """Return the template of a Jinja file, or of a tokenizer's folder (or its tokenizer.json).

    `tokenizer` is the folder of the tokenizer whose tokens a Jinja file uses; None: the file's own. Raise
    UsageError if there is no template, or it does not compile.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    is_file = path.is_file() and path.name != TOKENIZER_FILE
    folder = tokenizer or (path if path.is_dir() else path.parent)
    config = _read_json(folder / _CONFIG)
    text = path.read_text(encoding="utf-8") if is_file else _text_of(folder, config)
    if text is None:
        raise UsageError(f"{folder} has no chat template ({_FILE}, or chat_template in {_CONFIG})")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
    )
    environment.globals["raise_exception"] = _refuse
    if "strftime_now" in text and "strftime_now is defined" not in text:
        environment.globals["strftime_now"] = _DATE.strftime
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise UsageError(f"chat template of {path} does not compile: {error}") from None
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    named = {name: v.get("content") if isinstance(v, Mapping) else v for name, v in tokens.items()}
    variables = {name: token for name, token in named.items() if isinstance(token, str)}
    return ChatTemplate(text, compiled, variables, special_tokens(folder / TOKENIZER_FILE))


def _generation_blocks() -> Any:
    """Render the content of transformers' `{% generation %}`, which marks the assistant's text for masks."""
    from jinja2.ext import Extension
    from jinja2.nodes import Scope

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(inside, lineno=line)

    return Generation


def has_template(folder: Path) -> bool:
    return _text_of(folder, _read_json(folder / _CONFIG)) is not None


def _text_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / _FILE).is_file():
        return (folder / _FILE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {item.get("name"): item.get("template") for item in template}.get("default")
    return template if isinstance(template, str) else None


def special_tokens(file: Path) -> tuple[str, ...]:
    """Return the special tokens of a tokenizer.json; empty if there is no such file."""
    if not file.is_file():
        return ()
    status = file.stat()
    return _special_tokens(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)  # tens of megabytes, read for each batch of documents
def _special_tokens(file: Path, size: int, mtime_ns: int) -> tuple[str, ...]:
    added = _read_json(file).get("added_tokens", [])
    return tuple(token["content"] for token in added if token.get("special"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _refuse(message: str) -> None:
    raise ValueError(message)
