"""How many questions of a test set stand in a body of training text: shared runs of words.

    found = overlap(questions, texts)        # -> [True, False, None, ...] by question

The rule is that of decontamination (cleaning/contamination.py): a question counts when 13 of its words in a
row stand in a training text; one of fewer words, down to 8, when all of it does; of shorter ones nothing is
said.
Memory is that of the questions, however much training text there is.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from r1hpc.data.cleaning.batch import Hashes, Ints, TextBatch, ngrams

NGRAM = 13
MIN_WORDS = 8
_BATCH = 2048


def overlap(questions: Sequence[str], texts: Iterable[str]) -> list[bool | None]:
    """Whether each question is found in any of the texts; None for one that is too short to be looked for."""
    tables = _tables(questions)
    hit = {size: np.zeros(len(keys), bool) for size, (keys, _) in tables.items()}
    for batch in _batches(texts):
        words = batch.words
        hashes = batch.hashes(words)
        for size, (keys, _) in tables.items():
            seen = np.unique(ngrams(hashes, words.document, size)[0])
            hit[size] |= np.isin(keys, seen)
    found = np.zeros(len(questions), bool)
    for size, (_, owners) in tables.items():
        found[owners[hit[size]]] = True
    long_enough = TextBatch(list(questions), normal=True).words.count() >= MIN_WORDS
    return [bool(hit) if looked else None for hit, looked in zip(found, long_enough, strict=True)]


def _tables(questions: Sequence[str]) -> dict[int, tuple[Hashes, Ints]]:
    """Hashes of the questions' runs of words by their length, with the question each is of."""
    batch = TextBatch(list(questions), normal=True)
    words, counts = batch.words, batch.words.count()
    hashes = batch.hashes(words)
    tables: dict[int, tuple[Hashes, Ints]] = {}
    for size in range(MIN_WORDS, NGRAM + 1):
        keys, first = ngrams(hashes, words.document, size)
        owners = words.document[first]
        chosen = counts[owners] >= size if size == NGRAM else counts[owners] == size
        if chosen.any():
            tables[size] = keys[chosen], owners[chosen]
    return tables


def _batches(texts: Iterable[str]) -> Iterator[TextBatch]:
    source = iter(texts)
    while batch := list(islice(source, _BATCH)):
        yield TextBatch(batch, normal=True)
