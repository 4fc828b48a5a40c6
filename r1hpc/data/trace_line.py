"""One line of a file of traces: a JSON object whose prompt and completion are text.

prompt, completion = parse_trace(b'{"prompt": "2+2=", "completion": "4"}')      # as UTF-8
"""

import json
from collections.abc import Mapping
from typing import Any

from r1hpc.base.names import nearest

_CALLED_OTHERWISE = (
    ("question", "problem", "instruction", "query", "input"),
    ("answer", "response", "output", "solution", "generation", "target"),
)
"""What other collections call a prompt, and a completion."""
_CONVERSATIONS = ("messages", "conversations", "conversation")
_SAID_BESIDE = ("system", "system_prompt", "context", "input", "thinking", "reasoning", "reasoning_content")
"""What other collections put beside them, as text."""
_MOST_SHOWN = 6


def parse_trace(
    line: bytes, prompt_field: str = "prompt", completion_field: str = "completion"
) -> tuple[bytes, bytes]:
    """Prompt and completion as UTF-8.

    Raises:
        ValueError: says what is wrong with the line.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object with {prompt_field!r}")
    fields = (prompt_field, completion_field)
    prompt, completion = (_text(value, fields, index) for index in range(2))
    return prompt, completion


def also_said(line: bytes) -> list[str]:
    """Fields of a line that say something of their own beside prompt and completion, and are not learnt."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    learnt = f"{value.get('prompt')}\n{value.get('completion')}"
    found = {name: value[name].strip() for name in _SAID_BESIDE if isinstance(value.get(name), str)}
    return [repr(name) for name, text in found.items() if text and text not in learnt]


def _text(value: Mapping[str, Any], fields: tuple[str, str], index: int) -> bytes:
    name = fields[index]
    if name not in value:
        raise ValueError(f"no field {name!r}{_what_there_is(value, fields, index)}")
    text = value[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}, not a string")
    if not text:
        raise ValueError(f"field {name!r} is empty")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} is not UTF-8 (half a surrogate pair at {error.start})") from None


def _what_there_is(value: Mapping[str, Any], fields: tuple[str, str], index: int) -> str:
    """What stands in the line in place of a field, and what becomes of it."""
    if near := nearest(fields[index], value):
        return near
    if other := next((name for name in _CALLED_OTHERWISE[index] if name in value), None):
        return f": rename {other!r} to {fields[index]!r}"
    if chat := next((name for name in _CONVERSATIONS if name in value), None):
        return f": write what the user says in {chat!r} as {fields[0]!r}, what is answered as {fields[1]!r}"
    return f"; it has {', '.join(map(repr, list(value)[:_MOST_SHOWN])) or 'none'}"
