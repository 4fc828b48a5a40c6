"""Ask test files completely and in order, every question once: evaluate.path and evaluate.sets.

A question that occurs twice in a file, with the same answer, is asked once. The files of evaluate.trained_on
are found and checked here too; generate.py searches them for these questions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from r1hpc.base.errors import UsageError
from r1hpc.base.files import files_of_lines, matching
from r1hpc.config.paths import FILES
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.file import (
    Columns,
    Question,
    judge_of,
    named_judge,
    read_questions,
    table_batches,
    tables_in,
    unmarked,
)
from r1hpc.tasks.problems.listed import TEMPLATE, check_template, fill
from r1hpc.tasks.problems.task import Item, task_id


class Benchmark:
    """One test file. All of it is held out: it has no training part."""

    def __init__(self, path: Path, columns: Columns, template: str, judge: str, judge_key: str) -> None:
        self.name = path.name
        self.judge = judge_of(columns, judge, judge_key)
        self.judge_settings: dict[str, Any] = {}
        self._template = check_template(template)
        rows, digest = read_questions(path, columns)
        self.num_rows = len(rows)
        different: dict[tuple[str, str], Question] = {}
        for row in rows:
            different.setdefault((row.text, row.answer), row)
        self.questions = tuple(different.values())
        self.notes = unmarked(rows, str(path))
        """Sentences on answers that may be solutions."""
        if not rows:
            raise UsageError(f"{path} has no question")
        content = {"sha256": digest, "template": template, **columns.unusual(), **named_judge(judge)}
        self.id = task_id("benchmark", 0, content)

    def item(self, index: int, held_out: bool = True) -> Item:
        question = self.questions[index]
        prompt = fill(self._template, question.text)
        return Item(index, prompt, question.answer, question.metadata(), where=question.where)

    def num_questions(self, held_out: bool = True) -> int:
        return len(self.questions)

    def demonstration(self, item: Item, thinking: bool) -> str:
        raise UsageError(f"{self.name} is a test file: no demonstration is made of it")


class Benchmarks:
    """Several test files, one after the other; their items carry the file's label."""

    judge = ""
    judge_settings: Mapping[str, Any] = {}

    def __init__(
        self,
        sets: Mapping[str, tuple[Benchmark, int | None]],
        number: str = "evaluate.sets.{label}.num_items",
    ) -> None:
        """`sets`: by label, with how many questions of each are asked; None: all. `number`: the setting with
        that number, for errors. Raise UsageError if a file has fewer."""
        self.members = {label: each for label, (each, _) in sets.items()}
        self.name = " + ".join(sets)
        self.sizes = {label: _size(label, each, wanted, number) for label, (each, wanted) in sets.items()}
        self._ends = list(accumulate(self.sizes.values()))
        self.num_items = self._ends[-1]
        inner = {label: [each.id, self.sizes[label]] for label, each in self.members.items()}
        self.id = task_id("benchmarks", 0, inner)

    @classmethod
    def of(cls, config: RunConfig) -> Self | None:
        """Return the test files of a configuration; None if it names none. Raise UsageError for a file that
        cannot be used, or that has fewer questions than requested."""
        sets = named_sets(config)
        if not sets:
            return None
        opened = {label: (_open(config, label, part), part.get("num_items")) for label, part in sets.items()}
        return cls(opened, "evaluate.num_items") if config.evaluate.path is not None else cls(opened)

    def item(self, index: int, held_out: bool = True) -> Item:
        start = 0
        for label, end in zip(self.members, self._ends, strict=True):
            if index < end:
                return replace(self.members[label].item(index - start), index=index, task=label)
            start = end
        raise IndexError(index)

    def num_questions(self, held_out: bool = True) -> int:
        return self.num_items

    def demonstration(self, item: Item, thinking: bool) -> str:
        return self.members[item.task].demonstration(item, thinking)


def named_sets(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return evaluate.sets, or evaluate.path as a set named after the file; num_items is for all of them."""
    evaluate = config.evaluate
    sets = evaluate.sets
    if evaluate.path is not None:
        # Without characters that a label cannot have: `gsm8k/test-*.parquet` becomes `test`.
        label = re.sub(r"[^A-Za-z0-9_-]", "_", Path(evaluate.path).stem.rstrip("-*?"))[:40] or "_"
        sets = {label: {"path": evaluate.path}}
    return {label: {"num_items": evaluate.num_items, **part} for label, part in sets.items()}


def with_counted_sets(config: RunConfig) -> RunConfig:
    """Replace evaluate.path by evaluate.sets, each with the number it will ask; raise as `Benchmarks.of`."""
    benchmarks = Benchmarks.of(config)
    if benchmarks is None:
        return config
    sizes = benchmarks.sizes
    sets = {label: {**part, "num_items": sizes[label]} for label, part in named_sets(config).items()}
    return replace(config, evaluate=replace(config.evaluate, path=None, sets=sets))


def _open(config: RunConfig, label: str, part: Mapping[str, Any]) -> Benchmark:
    task = config.task
    template = part.get("template", task.options.get("template", TEMPLATE))
    columns = Columns(**{name: part.get(name, getattr(task, name)) for name in Columns.__annotations__})
    judge, key = part.get("judge"), f"evaluate.sets.{label}.judge"
    # The task's settings for its own file's answers hold here too, except for multiple choice.
    if judge is None and task.name in FILES and not columns.choices and task.options.get("judge"):
        judge, key = task.options["judge"], "task.options.judge"
    return Benchmark(Path(part["path"]), columns, str(template), str(judge or ""), key)


def _size(label: str, benchmark: Benchmark, wanted: int | None, number: str) -> int:
    there = len(benchmark.questions)
    if wanted is not None and wanted > there:
        twice = f" ({benchmark.num_rows} rows, some of them the same)" if benchmark.num_rows > there else ""
        raise UsageError(
            f"evaluate asks {wanted} questions of {label}, but {benchmark.name} has {there}{twice}: set "
            f"{number.format(label=label)}={there}, or leave it out to ask all"
        )
    return there if wanted is None else wanted


def check_trained_on(config: RunConfig, to_come: Sequence[Path] = ()) -> None:
    """Refuse paths that cannot be searched, except those in `to_come`, folders that other runs have yet to
    fill.

    Raise UsageError if there is no test file to search for, or for a missing or unreadable file or folder.
    """
    evaluate = config.evaluate
    given = [name for name in ("trained_on", "not_searched") if getattr(evaluate, name)]
    has_tests = evaluate.path is not None or bool(evaluate.sets)
    if given and (config.stage == "rl" or (config.stage == "evaluate" and not has_tests)):
        why = "reports nothing of it" if config.stage == "rl" else "asks no test file here"
        raise UsageError(
            f"evaluate.{given[0]} is for stage evaluate with evaluate.path or evaluate.sets, whose questions "
            f"are looked for in it, and stage {config.stage} {why}: take it out; in a chain file give it to "
            f"the stages that it is for, on the command line as STAGE:evaluate.{given[0]}"
        )
    if config.stage != "evaluate":
        return
    for path in evaluate.trained_on:
        if not any(Path(path).is_relative_to(folder) for folder in to_come):
            tables, _ = training_files(path)
            for table in tables:
                next(table_batches(table), None)


def training_files(path: str) -> tuple[list[Path], list[Path]]:
    """Return (tables, files of lines) of a path of evaluate.trained_on: a file, those in a folder, or those
    that match a pattern in its last part. Raise UsageError if there are none."""
    whole = Path(path)
    tables = tables_in(whole)
    found = files_of_lines(whole) if whole.is_dir() else matching(whole)
    lines = sorted(file for file in found if file.is_file() and file not in tables)
    if not (tables or lines):
        what = "holds no *.jsonl, *.parquet or *.arrow" if whole.is_dir() else "is not there"
        raise UsageError(f"evaluate.trained_on: {path} {what}; name files, or folders of them")
    return tables, lines
