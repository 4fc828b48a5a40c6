"""file: question and answer pairs from a file or folder (question_file.py says which, and in which forms).

    task: {name: file, options: {path: data/train.jsonl}}
    task: {name: file, question: problem, answer: solution, options: {path: data/math.parquet}}

One question in ten is held out; each pass over the rest has its own order, from the seed. A test file that is
to be asked whole and in order is no task but `evaluate.path` (benchmark.py). `jsonl` is the older name.
"""

import hashlib
from collections.abc import Callable, Mapping
from importlib import util
from itertools import compress
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.config.reasoning import TaskConfig
from r1hpc.tasks.completion import compose
from r1hpc.tasks.listed import Listed
from r1hpc.tasks.prompts import TEMPLATE, check_template, fill
from r1hpc.tasks.question_file import Columns, Question, read_questions, unmarked
from r1hpc.tasks.task import Item, check_options, task_id

_JUDGES = ("math", "exact")


class QuestionFile:
    """A file's questions. The identity holds the SHA-256 of its bytes, not its place."""

    def __init__(self, config: TaskConfig, fits: Callable[[str, str], bool] | None = None) -> None:
        """See registry.make_task."""
        self.name = config.name
        options = check_options(self.name, config.options, {"path": "", "template": TEMPLATE, "judge": ""})
        if not options["path"]:
            raise UsageError(f"task.name={self.name} needs task.options.path=FILE")
        self._path = Path(options["path"])
        self._template = check_template(options["template"])
        columns = columns_of(config)
        self.judge = judge_of(columns, options["judge"], "task.options.judge")
        self.judge_settings: dict[str, Any] = {}
        self._questions, digest = read_questions(self._path, columns)
        content: dict[str, Any] = {"sha256": digest, "template": self._template, **columns.unusual()}
        content |= named_judge(options["judge"])
        self._dropped: list[Question] = []
        if fits is not None:
            kept = [fits(fill(self._template, row.text), row.where) for row in self._questions]
            self._dropped = [row for row, is_kept in zip(self._questions, kept, strict=True) if not is_kept]
            self._questions = list(compress(self._questions, kept))
            if not self._questions:
                raise UsageError(
                    f"every prompt of {self._path} is longer than rollout.max_prompt_length: raise it"
                )
            if self._dropped:
                content["kept"] = hashlib.sha256(bytes(kept)).hexdigest()
        # The key and the id of `jsonl`, so that runs of before go on.
        self.id = task_id("jsonl", config.seed, content)
        self._listed = Listed(
            ("jsonl", config.seed), [each.text for each in self._questions], str(self._path)
        )

    def oddities(self) -> list[str]:
        """Sentences on what may not be meant."""
        return [*self.left_out(), *unmarked(self._questions, str(self._path))]

    def left_out(self) -> list[str]:
        """Return a sentence on the rows that task.drop_longer left out, if there are any."""
        if not self._dropped:
            return []
        total = len(self._dropped) + len(self._questions)
        return [
            f"{len(self._dropped):,} of {total:,} rows of {self._path} are left out, the first is "
            f"{self._dropped[0].where}: their prompts are longer than rollout.max_prompt_length"
        ]

    def item(self, index: int, held_out: bool = False) -> Item:
        position, epoch = self._listed.at(index, held_out)
        question = self._questions[position]
        metadata = {"thinking": question.thinking, "epoch": epoch, **question.metadata()}
        return Item(
            index, fill(self._template, question.text), question.answer, metadata, where=question.where
        )

    def num_questions(self, held_out: bool = False) -> int:
        return self._listed.num_questions(held_out)

    def items_per_pass(self, held_out: bool = False) -> int:
        return self._listed.items_per_pass(held_out)

    def demonstration(self, item: Item, thinking: bool) -> str:
        if thinking and not item.metadata["thinking"]:
            raise UsageError(
                f"{self._path} has no reasoning before #### or around \\boxed in item {item.index}: "
                "set generate.thinking_share=0"
            )
        return compose(item.metadata["thinking"] if thinking else "", item.answer)


def columns_of(values: TaskConfig | Mapping[str, Any]) -> Columns:
    """The columns that a task, or an entry with the same keys, names."""
    read = values.get if isinstance(values, Mapping) else lambda name, _: getattr(values, name)
    return Columns(read("question", "question"), read("answer", "answer"), read("choices", ""))


def judge_of(columns: Columns, asked: str = "", key: str = "") -> str:
    """The judge of a file's answers: letters by themselves, else the one asked for, else math-verify.

    Args:
        key: of `asked`, for an error; empty: there is none.

    Raises:
        UsageError: no such judge, one for the answers of multiple choice, or math-verify is not installed.
    """
    if asked not in ("", *_JUDGES):
        raise UsageError(f"{key} is {asked!r}: it must be {' or '.join(_JUDGES)}")
    if columns.choices:
        if asked:
            raise UsageError(
                f"{key}={asked}: with `choices` the letter of the choice is judged, leave it out"
            )
        return "choice"
    if asked == "exact":
        return asked
    if util.find_spec("math_verify") is None:
        way_on = f", or have answers compared character by character, {key}=exact" if key else ""
        raise UsageError(f"questions from a file need math-verify: pip install 'r1hpc[reasoning]'{way_on}")
    return "math"


def named_judge(asked: str) -> dict[str, str]:
    """What a judge that was asked for adds to the identity of its questions."""
    return {"judge": asked} if asked else {}
