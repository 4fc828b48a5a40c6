r"""Make the task `file`: questions with answers from a local file, in the published forms of benchmarks.

    task: {name: file, options: {path: data/train.jsonl}}
    task: {name: file, question: problem, answer: solution, options: {path: data/math.parquet}}

    questions, digest = read_questions(Path("gsm8k/test.jsonl"), Columns())

Files: JSONL (one object a line), Parquet, Arrow; a folder of them, as `datasets` saves one; or some of a
folder (`gsm8k/main/train-*.parquet`), if it holds several splits. `jsonl` is the older name of the task.
Answers:
    "... reasoning ... #### 42"     GSM8K: the text after the last ####; the rest is thinking to show
    "... so it is \boxed{42}."     solutions of MATH: the content of the last \boxed; the rest is thinking
    "42", 42, "\boxed{42}"          MATH-500, AIME: all of it, without a box around it
    "C", 2, the choice's text       multiple choice (MMLU, ARC), with a column of choices; numbers from 0

One question in ten is held out; each pass over the rest has its own order, from the seed. To ask a test file
completely and in order, use `evaluate.path` (benchmark.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import util
from itertools import chain, compress
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.paths import KINDS, TABLES, named_by, of_one_kind
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.tasks.problems.listed import TEMPLATE, Listed, check_template, fill
from r1hpc.tasks.problems.task import Item, check_options, task_id
from r1hpc.tasks.text.format import TAGS, boxed_in_solution, compose, out_of_box

_MARK = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator, such as <<48/2=24>>: no part of the reasoning."""
_MOST_MARKED = 0.5
_WORDS_OF_AN_ANSWER = 6
"""An answer with more words is a solution, or a part of one."""
_BOX = re.compile(r"\\(boxed|fbox)\b")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
_ROWS = 1024
"""Rows of a Parquet table in memory at once; Arrow has its own number."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Row = Mapping[str, Any]
_JUDGES = ("math", "exact")


@dataclass(frozen=True)
class Columns:
    """Names of the columns; no `choices`: the answer is free text."""

    question: str = "question"
    answer: str = "answer"
    choices: str = ""

    def unusual(self) -> dict[str, str]:
        """Return the names that differ from the default."""
        usual = asdict(Columns())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}


@dataclass(frozen=True)
class Question:
    """One question. With choices, `text` lists them and `answer` is a letter."""

    text: str
    answer: str
    thinking: str = ""
    choices: tuple[str, ...] = ()
    is_marked: bool = field(default=False, compare=False)
    """A mark or a box showed which part of the text is the answer."""
    where: str = field(default="", compare=False)
    """The file and its line, or row."""

    @property
    def alone(self) -> str:
        """Return the question without its choices."""
        return self.text.removesuffix(f"\n{_listed(self.choices)}") if self.choices else self.text

    def metadata(self) -> dict[str, Any]:
        """Return what a judge must know about it."""
        return {"choices": list(self.choices)} if self.choices else {}


def read_questions(path: Path, columns: Columns) -> tuple[list[Question], str]:
    """Return the questions in order, and the SHA-256 of their files; UsageError names file and row."""
    files = _files(path)
    try:
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        questions = [to_question(where, row, columns) for file in files for where, row in _rows(file)]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return questions, whole


def unmarked(questions: Sequence[Question], name: str) -> list[str]:
    """Return a note if some answers are solutions without a mark among others that have one."""
    marked = sum(each.is_marked for each in questions)
    whole = sum(not each.is_marked and len(each.answer.split()) > _WORDS_OF_AN_ANSWER for each in questions)
    if not whole or marked < _MOST_MARKED * len(questions):
        return []
    return [
        f"{whole:,} of {len(questions):,} answers in {name} have neither {_MARK} nor a box, as the others "
        "have: all of their text is taken as the answer. Leave those lines out, or mark their answers"
    ]


def tables_in(path: Path) -> list[Path]:
    """Return the Parquet and Arrow files that `path` names; none for files of lines or a missing path."""
    return [file for file in named_by(path) if file.suffix in TABLES and file.is_file()]


def table_batches(path: Path) -> Iterator[list[Any]]:
    """Yield the rows of a Parquet or Arrow file, some at a time; raise UsageError if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from (batch.to_pylist() for batch in file.iter_batches(_ROWS))
            return
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                yield from (batch.to_pylist() for batch in pyarrow.ipc.open_stream(mapped))
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(mapped)
                yield from (whole.get_batch(i).to_pylist() for i in range(whole.num_record_batches))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


def _files(path: Path) -> list[Path]:
    if found := of_one_kind(path):
        return found
    if not path.is_dir():
        raise UsageError(f"{path} is not there: give the path of a file of questions")
    inner = [file for file in named_by(path) if file.is_dir() and not file.name.startswith(".")]
    folders = [folder.name for folder in inner]
    hint = ""
    if folders:
        hint = f"; it has the folders {', '.join(folders[:6])}: name one, as in {path / folders[0]}"
    raise UsageError(f"the folder {path} holds no {', '.join(f'*{kind}' for kind in KINDS)}{hint}")


def check_one_split(path: Path) -> None:
    """Refuse a folder or pattern that mixes a dataset's test questions with its training questions; the Hub
    has both in one folder of Parquet files. `*.parquet` takes all of them. Raise UsageError with the files,
    and a pattern of one split."""
    files = _files(path)
    if len(files) == 1 or path.name.startswith("*"):
        return
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split("[^a-z]+", file.stem.lower())
        if split := next((word for word in words if word in _SPLITS), None):
            splits.setdefault(split, []).append(file)
    if len(splits) > 1:
        folder, suffix = files[0].parent, files[0].suffix
        split, one = next((each for each in splits.items() if each[0] == "train"), next(iter(splits.items())))
        pattern = one[0].name if len(one) == 1 else f"*{split}*{suffix}"
        way = f"name the files of one, as in {folder / pattern}"
        if of_one_kind(folder / pattern) != one:
            way = "put the files of one into a folder of its own"
        names = " and ".join(of_split[0].name for of_split in splits.values())
        raise UsageError(
            f"{path} holds several splits of a dataset ({names}): {way}, or name "
            f"all of them by {folder / f'*{suffix}'}"
        )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix in (".gz", ".zst", ".bz2", ".xz", ".zip"):
        raise UsageError(f"{path} is compressed: unpack it")
    if path.suffix not in TABLES:
        raw = path.read_bytes()
        if raw.lstrip().startswith(b"["):
            raise UsageError(f"{path} holds a JSON list: write one object a line (jq -c '.[]')")
        for number, line in enumerate(raw.split(b"\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(f"{path}:{number}", line)
        return
    for number, row in enumerate(chain.from_iterable(table_batches(path)), 1):
        yield f"{path}, row {number}", row


class _Written(float):
    """A number that keeps its text: `0.10`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{where} has the key {twice!r:.60} twice: keep one")
    return found


def _parsed(where: str, line: bytes) -> Any:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        raise UsageError(
            f"{where} is not UTF-8, it may be UTF-16: convert the file by iconv -f UTF-16 -t UTF-8"
        )
    try:
        return json.loads(line, parse_float=_Written, object_pairs_hook=partial(_once, where))
    except UsageError:  # a ValueError too
        raise
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is not a JSON object; fix the line") from None


def to_question(where: str, row: Any, columns: Columns) -> Question:
    """Return the question in a row at `where`; UsageError if it has none, or an invalid answer."""
    if not isinstance(row, Mapping):
        raise UsageError(f"{where} is not a JSON object; fix the line")
    text = _value(where, row, columns.question, "question")
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: {columns.question} is {text!r:.60}: a question must be text")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError(
            f"{where}: {columns.question} holds half of a surrogate pair: write the character out"
        )
    answer = _value(where, row, columns.answer, "answer")
    if columns.choices:
        return _choice(where, text, answer, _value(where, row, columns.choices, "choices"))
    return _free(where, text, _text(where, columns.answer, answer))


def _free(where: str, text: str, answer: str) -> Question:
    thinking, mark, final = answer.rpartition(_MARK)
    boxed = boxed_in_solution(answer)
    if not mark and boxed is not None and boxed.start:
        thinking, final = _BOX.sub("", answer), boxed.content
    elif not mark:
        thinking, final = "", answer
    is_marked = bool(mark) or boxed is not None
    said, thinking = out_of_box(final.strip()), _CALCULATOR.sub("", thinking).strip()
    question = Question(text, said, thinking, is_marked=is_marked, where=where)
    if not question.answer or any(tag in question.thinking + question.answer for tag in TAGS):
        raise UsageError(f"{where}: the answer is empty or holds one of {' '.join(TAGS)}; fix the line")
    return question


def _choice(where: str, text: str, answer: Any, choices: Any) -> Question:
    """Read the choices as a list, or in the form of ARC: {text: [...], label: [...]}."""
    labels: Sequence[Any] = LETTERS
    if isinstance(choices, Mapping):
        labels, choices = choices.get("label", LETTERS), choices.get("text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise UsageError(f"{where}: the choices must be a list of 2 to {len(LETTERS)} texts")
    texts = [_text(where, "the choices", choice) for choice in choices]
    right = _which(answer, texts, [str(label).strip() for label in labels])
    if right is None:
        raise UsageError(f"{where}: the answer {answer!r:.60} names none of the {len(texts)} choices")
    return Question(f"{text}\n{_listed(texts)}", LETTERS[right], choices=tuple(texts), where=where)


def _listed(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _which(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    """Find the choice by label, by position from 0, or by its text. A number may be a label, as in ARC."""
    if str(answer) in labels[: len(texts)]:
        return list(labels).index(str(answer))
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    for names in (labels[: len(texts)], texts):
        if str(answer).strip() in names:
            return list(names).index(str(answer).strip())
    return None


def _value(where: str, row: Row, column: str, what: str) -> Any:
    if column not in row:
        raise UsageError(
            f"{where} has no column {column!r}{nearest(column, map(str, row))}; it has: "
            f"{', '.join(map(str, row))[:200]}. Name it by task.{what}=COLUMN (of one test "
            f"file by evaluate.sets.LABEL.{what}); every line must have it"
        )
    return row[column]


def _text(where: str, column: str, value: Any) -> str:
    """Return text unchanged, a number as it is written; a whole one without its point, as AIME's `33.0`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: {column} is {value!r:.60}: it must be text or a number")
    return value


class QuestionFile:
    """Questions of a file. The identity holds the SHA-256 of its bytes, not its path."""

    def __init__(self, config: TaskConfig, fits: Callable[[str, str], bool] | None = None) -> None:
        """See registry.make_task."""
        self.name = config.name
        options = check_options(self.name, config.options, {"path": "", "template": TEMPLATE, "judge": ""})
        if not options["path"]:
            raise UsageError(f"task.name={self.name} needs task.options.path=FILE")
        self._path = Path(options["path"])
        self._template = check_template(options["template"])
        columns = Columns(config.question, config.answer, config.choices)
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
                    f"every prompt of {self._path} is longer than rollout.max_prompt_length: raise it, or "
                    "shorten task.options.template"
                )
            if self._dropped:
                content["kept"] = hashlib.sha256(bytes(kept)).hexdigest()
        # The key and the ID of `jsonl`, so that older runs can resume.
        self.id = task_id("jsonl", config.seed, content)
        texts = [each.text for each in self._questions]
        self._listed = Listed(("jsonl", config.seed), texts, str(self._path))

    def notes(self) -> list[str]:
        """Return sentences about what may be unintended."""
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
        prompt = fill(self._template, question.text)
        return Item(index, prompt, question.answer, metadata, where=question.where)

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


def judge_of(columns: Columns, asked: str = "", key: str = "") -> str:
    """Return the judge of a file's answers: letters by themselves, else the one requested, else math-verify.

    `key` is the setting of `asked`, for an error; empty: there is none. Raise UsageError if there is no such
    judge, it does not fit multiple choice, or math-verify is not installed.
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
        raise UsageError(f"questions from a file need math-verify: pip install 'r1hpc[math]'{way_on}")
    return "math"


def named_judge(asked: str) -> dict[str, str]:
    """Return what a requested judge adds to the identity of its questions."""
    return {"judge": asked} if asked else {}
