"""Measure how many questions of an evaluation's test files occur in the training data (evaluate.trained_on).

Test files are read by `tasks`, training text by `data`; neither knows the other, so they meet here. For
multiple choice only the question is searched, as its choices are laid out differently elsewhere.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from r1hpc.config.schema.run import RunConfig
from r1hpc.corpus.clean.contamination import NGRAM, overlap
from r1hpc.corpus.sources.lines import iter_lines
from r1hpc.tasks.problems.benchmark import Benchmarks, training_files
from r1hpc.tasks.problems.file import table_batches

_LINES_A_BEAT = 1000


def contamination(
    config: RunConfig,
    beat: Callable[[], None] = lambda: None,
    not_read: Callable[[str], object] = lambda sentence: None,
) -> dict[str, Any] | None:
    """Return by test file, for questions long enough to search: {num_questions, num_found, share, ngram,
    num_too_short}; None without training data to compare with.

    Args:
        beat: called while it reads, which may take hours.
        not_read: called with each part of a file that could not be read.
    """
    benchmarks = Benchmarks.of(config)
    if benchmarks is None or not config.evaluate.trained_on:
        return None
    questions = {
        label: [each.alone for each in benchmark.questions[: benchmarks.sizes[label]]]
        for label, benchmark in benchmarks.members.items()
    }
    found = iter(
        overlap([text for texts in questions.values() for text in texts], _texts(config, beat, not_read))
    )
    report = {}
    for label, texts in questions.items():
        hits = [hit for hit in islice(found, len(texts)) if hit is not None]
        report[label] = {
            "num_questions": len(hits),
            "num_found": sum(hits),
            "share": sum(hits) / len(hits) if hits else None,
            "ngram": NGRAM,
            "num_too_short": len(texts) - len(hits),
        }
    return report


def _texts(config: RunConfig, beat: Callable[[], None], not_read: Callable[[str], object]) -> Iterator[str]:
    """Yield every record of the training files, with all its strings as one text."""
    for path in config.evaluate.trained_on:
        tables, files = training_files(path)
        for table in tables:
            for rows in table_batches(table):
                beat()
                yield from map(_said, rows)
        for file in files:
            for number, line in enumerate(iter_lines(file, 0, None)):
                if number % _LINES_A_BEAT == 0:
                    beat()
                if line.fault:
                    not_read(f"{file} at byte {line.position:,}: {line.fault}")
                yield _said(_parsed(line.raw))


def _said(record: Any) -> str:
    return "\n".join(_strings(record))


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw.decode("utf-8", "replace")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, bytes):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)
