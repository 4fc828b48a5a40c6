"""Find evaluation questions in documents, and which questions of a test set occur in training text.

    index = build_index([Path("gsm8k-test.jsonl")], recipe)
    index.find(batch)                        # for each document a file it shares an n-gram with, or -1
    found = overlap(questions, texts)        # -> [True, False, None, ...] by question

Both look for shared n-grams of words. Words are those of the lower-cased text without punctuation (Brown et
al. 2020, appendix C). An evaluation item of fewer than `ngram` words, but at least `min_words`, is searched
as a whole. `overlap` uses the same rule for a test set in any amount of training text: a question counts if
13 consecutive words occur in a text; one of 8 to 12 words if all of it does; shorter ones give None. Its
memory depends on the questions only.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from r1hpc.base.errors import UsageError
from r1hpc.corpus.clean.batch import Hashes, Ints, TextBatch
from r1hpc.corpus.recipe import DecontaminateRecipe
from r1hpc.corpus.sources.lines import open_file

_BATCH = 2048
NGRAM = 13
MIN_WORDS = 8


@dataclass(frozen=True)
class NgramIndex:
    """Hashes of the n-grams of all evaluation items, by length, with the file of each."""

    tables: dict[int, tuple[Hashes, Ints]]

    def find(self, batch: TextBatch) -> Ints:
        """Return the file each document shares an n-gram with; -1 for none. `batch` is of normal text."""
        found = np.full(batch.num_documents, -1, dtype=np.int64)
        for size, (known, files) in self.tables.items():
            keys, document = batch.ngrams(size)
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = np.flatnonzero(known[place] == keys)
            found[document[hit][::-1]] = files[place[hit]][::-1]  # the first hit wins
        return found


def build_index(paths: Sequence[Path], recipe: DecontaminateRecipe) -> NgramIndex:
    """Index the evaluation files; UsageError for one that cannot be read or has no item of min_words."""
    found: dict[int, list[tuple[Hashes, int]]] = {}
    for number, path in enumerate(paths):
        before = sum(map(len, found.values()))
        for batch in _batches(_items(path)):
            for size, keys, _ in batch.runs(recipe.min_words, recipe.ngram):
                found.setdefault(size, []).append((keys, number))
        if sum(map(len, found.values())) == before:
            raise UsageError(
                f"decontaminate.against: {path} has no item of at least {recipe.min_words} words; "
                "lower min_words"
            )
    tables = {}
    for size, parts in sorted(found.items(), reverse=True):
        files = np.concatenate([np.full(len(part), number) for part, number in parts])
        known, first = np.unique(np.concatenate([part for part, _ in parts]), return_index=True)
        tables[size] = (known, files[first])
    return NgramIndex(tables)


def _batches(texts: Iterable[str]) -> Iterator[TextBatch]:
    source = iter(texts)
    while batch := list(islice(source, _BATCH)):
        yield TextBatch(batch, normal=True)


def _items(path: Path) -> Iterator[str]:
    """Yield the items of an evaluation file: every string of its JSON, complete or line by line, or the
    paragraphs of a text. The first characters decide, as JSON lines are often named .json."""
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"decontaminate.against: {path} cannot be read: {error}") from None
    if (whole := _json(text)) is not None:
        yield from _strings(whole)
    elif ".jsonl" in path.suffixes or _json(text.strip().partition("\n")[0]) is not None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _strings(_parse(path, number, line))
    elif ".json" in path.suffixes:
        raise UsageError(f"decontaminate.against: {path} holds neither one JSON value nor an object a line")
    else:
        yield from re.split(r"\n\s*\n", text)


def _json(text: str) -> Any:
    """Return the value of a JSON object or list of more than numbers; else None (prose may begin `[1]`)."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if next(_strings(value), None) is not None else None


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"decontaminate.against: {path}:{number}: not JSON ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def overlap(questions: Sequence[str], texts: Iterable[str]) -> list[bool | None]:
    """Return for each question: True if it occurs in any of the texts; None if it is too short to search."""
    asked = TextBatch(list(questions), normal=True)
    tables = {size: (keys, owners) for size, keys, owners in asked.runs(MIN_WORDS, NGRAM)}
    hit = {size: np.zeros(len(keys), bool) for size, (keys, _) in tables.items()}
    for batch in _batches(texts):
        for size, (keys, _) in tables.items():
            seen, _ = batch.ngrams(size)
            hit[size] |= np.isin(keys, seen)
    found = np.zeros(len(questions), bool)
    for size, (_, owners) in tables.items():
        found[owners[hit[size]]] = True
    long_enough = asked.words.count() >= MIN_WORDS
    return [bool(hit) if looked else None for hit, looked in zip(found, long_enough, strict=True)]
