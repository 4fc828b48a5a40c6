"""jsonl: question and answer pairs from a file, one JSON object a line, in GSM8K's form.

    {"question": "...", "answer": "reasoning ... #### 42"}

The part after the last `####` is the answer, what stands before it is a demonstration's thinking; without
`####` all of it is the answer. Each pass over the file has its own order, from the seed.

    task: {name: jsonl, options: {path: data/train.jsonl}}
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.tasks.completion import TAGS, compose
from r1hpc.tasks.prompts import TEMPLATE, check_template, fill, held_out_key
from r1hpc.tasks.task import Draws, Item, check_options, is_held_out, task_id

_MARK = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator, such as <<48/2=24>>: no part of the reasoning."""


@dataclass(frozen=True)
class _Pair:
    question: str
    thinking: str
    answer: str


class Jsonl:
    """A file's questions. The identity holds the SHA-256 of its bytes, not its place."""

    name = "jsonl"
    judge = "math"

    def __init__(self, seed: int, options: Mapping[str, Any]) -> None:
        if util.find_spec("math_verify") is None:
            raise UsageError("task.name=jsonl needs math-verify: pip install 'r1hpc[reasoning]'")
        options = check_options(self.name, options, {"path": "", "template": TEMPLATE})
        self._path = Path(options["path"])
        self._template = check_template(options["template"])
        self._seed = seed
        self.judge_settings: dict[str, Any] = {}
        raw = _content(self._path)
        pairs = _pairs(self._path, raw)
        self._parts = {
            part: [pair for pair in pairs if is_held_out(held_out_key(pair.question)) == part]
            for part in (False, True)
        }
        content = {"sha256": hashlib.sha256(raw).hexdigest(), "template": self._template}
        self.id = task_id(self.name, seed, content)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def item(self, index: int, held_out: bool = False) -> Item:
        pairs = self._parts[held_out]
        if not pairs:
            part = "held-out" if held_out else "training"
            raise UsageError(
                f"{self._path} has no {part} questions (about one in ten is held out): add lines"
            )
        epoch, position = divmod(index, len(pairs))
        pair = pairs[self._order(epoch, held_out)[position]]
        prompt = fill(self._template, pair.question)
        return Item(index, prompt, pair.answer, {"thinking": pair.thinking, "epoch": epoch})

    def num_questions(self, held_out: bool = False) -> int:
        return len({pair.question for pair in self._parts[held_out]})

    def demonstration(self, item: Item, thinking: bool) -> str:
        if thinking and not item.metadata["thinking"]:
            raise UsageError(
                f"{self._path} has no reasoning before {_MARK} in item {item.index}: "
                "set generate.thinking_share=0"
            )
        return compose(item.metadata["thinking"] if thinking else "", item.answer)

    def _shuffled(self, epoch: int, held_out: bool) -> list[int]:
        draws = Draws(self.name, self._seed, epoch, int(held_out))
        return draws.shuffled(len(self._parts[held_out]))


def _content(path: Path) -> bytes:
    if not path.name:
        raise UsageError("task.name=jsonl needs task.options.path=FILE")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"task.options.path={path} cannot be read: {error.strerror}") from None


def _pairs(path: Path, raw: bytes) -> list[_Pair]:
    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    return [_pair(f"{path}:{number}", line) for number, line in lines]


def _pair(where: str, line: bytes) -> _Pair:
    try:
        row = json.loads(line)
        question, answer = row["question"], row["answer"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f'{where} is not {{"question": ..., "answer": ...}}; mend the line') from None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UsageError(f"{where}: question and answer must be text")
    thinking, mark, final = answer.rpartition(_MARK)
    pair = _Pair(question, _CALCULATOR.sub("", thinking).strip(), (final if mark else answer).strip())
    if not pair.answer or any(tag in pair.thinking + pair.answer for tag in TAGS):
        raise UsageError(f"{where}: the answer is empty or holds one of {' '.join(TAGS)}; mend the line")
    return pair
