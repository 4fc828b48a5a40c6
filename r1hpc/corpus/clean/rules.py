"""Judge documents by the rules of Gopher, C4 and FineWeb: which are refused, and the number that decided.

Gopher (Rae et al. 2021, "Scaling Language Models", appendix A.1.1), quality and repetition: shares of words
count words and signs, as in datatrove, on which FineWeb's numbers are based; number and mean length count no
signs. Word length and English stop words do not apply to texts that are mostly CJK, and stop words only to
English if the language is known.

C4 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2): lines are dropped before
the document is judged. Removing repeated three-sentence spans is left out; `dedup` compares documents.
Sentences are counted by their ends, not by a tagger.

FineWeb (Penedo et al. 2024, "The FineWeb Datasets", section 3.6): its additional rules about lines.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.corpus.clean.batch import Bools, Hashes, Ints, Segments, TextBatch, longer_ngrams, of_document
from r1hpc.data.read.order import splitmix64

# Gopher.
MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_WORD_LENGTH, MAX_WORD_LENGTH = 3, 10
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_ALPHA_WORDS = 0.8
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_STOP_BATCH = TextBatch(STOP_WORDS)
_STOP_HASHES = _STOP_BATCH.hashes(_STOP_BATCH.tokens)
MIN_STOP_WORDS = 2
# Gopher, table A1.
MAX_DUPLICATE_LINES = 0.30
MAX_DUPLICATE_PARAGRAPHS = 0.30
MAX_DUPLICATE_LINE_CHARS = 0.20
MAX_DUPLICATE_PARAGRAPH_CHARS = 0.20
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_BULLETS = ("-", "\u2022")
_MOSTLY = 0.5
_Shares = npt.NDArray[np.float64]
# C4.
MIN_SENTENCES = 5
MIN_WORDS_PER_LINE = 3
C4_MAX_WORD_LENGTH = 1000
_C4_ENDS = (".", "?", "!", '"', "'", "\u201d", "\u3002", "\uff1f", "\uff01")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d)\]]*(?=\s|$)|[\u3002\uff1f\uff01]+")
# FineWeb.
MIN_PUNCTUATED_LINES = 0.12
MAX_SHORT_LINES = 0.67
SHORT_LINE_CHARS = 30
MAX_DUPLICATE_CHARS = 0.1
"""The paper's text says 0.1; datatrove's default is 0.01."""
MAX_LINES_PER_WORD = 0.3
_FINEWEB_ENDS = (*".?!", *"\u2026\u3002\uff0e\uff1f\uff01\u0964\u061f\u06d4\u1362")


class Verdicts:
    """The first check each document failed, with its value; an empty rule for those that passed."""

    def __init__(self, num_documents: int) -> None:
        self.rule = [""] * num_documents
        self.value = np.full(num_documents, np.nan)

    def refuse(self, failed: npt.NDArray[np.bool_], rule: str, value: npt.NDArray[Any]) -> None:
        """Record the documents that fail here and failed nothing before."""
        for number in np.flatnonzero(failed).tolist():
            if not self.rule[number]:
                self.rule[number] = rule
                self.value[number] = float(value[number])


def quality(texts: Sequence[str], batch: TextBatch, languages: Sequence[str] | None) -> Verdicts:
    """Judge by number and length of words, symbols, bullets, ellipses, letters and stop words."""
    found = Verdicts(len(texts))
    tokens = batch.tokens
    every = np.maximum(tokens.count(), 1)
    words = tokens.where(~batch.is_sign(tokens))
    count = words.count()
    length = words.total(batch.chars(words)) / np.maximum(count, 1)
    spaced = batch.cjk_share < _MOSTLY
    found.refuse((count < MIN_WORDS) | (count > MAX_WORDS), "gopher_quality.words", count)
    odd = (length < MIN_WORD_LENGTH) | (length > MAX_WORD_LENGTH)
    found.refuse(odd & spaced, "gopher_quality.word_length", length)
    signs = np.array([text.count("#") for text in texts]) / every
    found.refuse(signs > MAX_SYMBOLS_PER_WORD, "gopher_quality.hash_signs", signs)
    dots = np.array([text.count("...") + text.count("\u2026") for text in texts]) / every
    found.refuse(dots > MAX_SYMBOLS_PER_WORD, "gopher_quality.ellipses", dots)
    bullets, ellipses = _line_shares(texts)
    found.refuse(bullets > MAX_BULLET_LINES, "gopher_quality.bullet_lines", bullets)
    found.refuse(ellipses > MAX_ELLIPSIS_LINES, "gopher_quality.ellipsis_lines", ellipses)
    alpha = tokens.total(batch.has_alpha(tokens)) / every
    found.refuse(alpha < MIN_ALPHA_WORDS, "gopher_quality.alpha_words", alpha)
    english = spaced & np.array([language in ("", "en") for language in languages or [""] * len(texts)])
    short = tokens.where(tokens.stop - tokens.start <= max(map(len, STOP_WORDS)))
    hashes, stops = batch.hashes(short), np.zeros(batch.num_documents, dtype=np.int64)
    for hashed in _STOP_HASHES:
        stops += np.bincount(short.document[hashes == hashed], minlength=batch.num_documents) > 0
    found.refuse((stops < MIN_STOP_WORDS) & english, "gopher_quality.stop_words", stops)
    return found


def repetition(batch: TextBatch) -> Verdicts:
    """Judge by repeated lines, paragraphs and n-grams of words."""
    found = Verdicts(batch.num_documents)
    chars = np.maximum(batch.num_chars, 1)
    for segments, what, most, most_chars in (
        (batch.paragraphs, "paragraph", MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARS),
        (batch.lines, "line", MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARS),
    ):
        repeated = _repeated(of_document(batch.hashes(segments), segments.document))
        share = segments.total(repeated) / np.maximum(segments.count(), 1)
        found.refuse(share > most, f"gopher_repetition.duplicate_{what}s", share)
        share = segments.total(repeated * batch.chars(segments)) / chars
        found.refuse(share > most_chars, f"gopher_repetition.duplicate_{what}_chars", share)
    words = batch.tokens
    lengths = batch.chars(words)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for size, repeats in _repeated_ngrams(batch.hashes(words), words.document):
        if size in MAX_TOP_NGRAM:
            share = _top(repeats, size, ends, words) / chars
            found.refuse(share > MAX_TOP_NGRAM[size], f"gopher_repetition.top_{size}_gram", share)
        if size in MAX_DUPLICATE_NGRAMS:
            most = MAX_DUPLICATE_NGRAMS[size]
            share = words.total(_covered(repeats, size, len(lengths)) * lengths) / chars
            unrefused = np.array([not rule for rule in found.rule], dtype=bool)
            for number in np.flatnonzero((share > most) & unrefused).tolist():
                mine = words.document[repeats.first] == number
                once = _counted_once(repeats.first[mine], repeats.group[mine], size, ends)
                share[number] = once / chars[number]
            found.refuse(share > most, f"gopher_repetition.duplicate_{size}_grams", share)
    return found


@dataclass(frozen=True)
class _Repeats:
    """The n-grams of one size that repeat in their document, equal ones one after another."""

    first: Ints
    """The word each begins at."""
    group: Ints
    """The same number for equal n-grams."""

    @property
    def begin(self) -> Ints:
        """Return where each group begins."""
        return np.flatnonzero(np.diff(self.group, prepend=-1))


def _repeated_ngrams(hashes: Hashes, document: Ints) -> Iterator[tuple[int, _Repeats]]:
    """Yield the repeated n-grams of each size from 2 to the largest with a limit, with the size.

    In a repeated n-gram both n-grams of size - 1 repeat too, so few are left to sort in ordinary text.
    """
    first, rolled = np.arange(len(hashes)), hashes  # n-grams that may be repeated, and their hashes unmixed
    for size in range(2, max(MAX_DUPLICATE_NGRAMS) + 1):
        longer = np.flatnonzero(first[1:] == first[:-1] + 1)
        first, rolled = first[longer], longer_ngrams(rolled[longer], hashes[first[longer] + size - 1])
        inside = document[first] == document[first + size - 1]
        first, rolled = first[inside], rolled[inside]
        keys = of_document(splitmix64(rolled), document[first])
        order = np.argsort(keys)
        ranked = keys[order]
        begin, end = np.ones(len(ranked), dtype=bool), np.ones(len(ranked), dtype=bool)
        begin[1:] = end[:-1] = ranked[1:] != ranked[:-1]
        repeated = order[~(begin & end)]
        yield size, _Repeats(first[repeated], np.cumsum(begin, dtype=np.int64)[~(begin & end)])
        repeated.sort()
        first, rolled = first[repeated], rolled[repeated]


def _counted_once(firsts: Ints, groups: Ints, size: int, ends: Ints) -> int:
    """Count the characters of one document's repeated n-grams without overlap, like datatrove.

    They are at most the characters of the words in any repeated n-gram, which need no loop; only documents
    over that limit come here.
    """
    seen: set[int] = set()
    total = end = 0
    for first, group in sorted(zip(firsts.tolist(), groups.tolist(), strict=True)):
        if first < end:
            continue
        if group in seen:
            end = first + size
            total += int(ends[end] - ends[first])
        seen.add(group)
    return total


def _repeated(keys: Hashes) -> Bools:
    """True for all but one of equal keys."""
    found = np.ones(len(keys), dtype=bool)
    found[np.unique(keys, return_index=True)[1]] = False
    return found


def _top(repeats: _Repeats, size: int, ends: Ints, words: Segments) -> _Shares:
    """Return the characters of each document's most frequent n-gram, all occurrences; 0 if none repeats."""
    best = np.zeros(words.num_documents)
    begin = repeats.begin
    count = np.diff(begin, append=len(repeats.first))
    first = repeats.first[begin]
    spelled = ends[first + size] - ends[first] + size - 1
    document = words.document[first]
    often = np.zeros(words.num_documents, dtype=np.int64)
    np.maximum.at(often, document, count)
    chosen = count == often[document]
    np.maximum.at(best, document[chosen], (count * spelled)[chosen])
    return best


def _covered(repeats: _Repeats, size: int, num_words: int) -> Bools:
    """Return the words in an n-gram that occurred earlier in the document."""
    if not len(repeats.first):
        return np.zeros(num_words, dtype=bool)
    begin = repeats.begin
    earliest = np.repeat(np.minimum.reduceat(repeats.first, begin), np.diff(begin, append=len(repeats.first)))
    again = repeats.first[repeats.first != earliest]
    change = np.bincount(again, minlength=num_words + 1) - np.bincount(again + size, minlength=num_words + 1)
    return np.cumsum(change[:-1]) > 0


def _line_shares(texts: Sequence[str]) -> tuple[_Shares, _Shares]:
    """Return the share of each text's lines that begin with a bullet, and that end with an ellipsis."""
    bullets, ellipses = np.zeros(len(texts)), np.zeros(len(texts))
    for number, text in enumerate(texts):
        lines = text.splitlines()
        if lines:
            bullets[number] = sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines)
            ends = sum(line.rstrip().endswith(("...", "\u2026")) for line in lines)
            ellipses[number] = ends / len(lines)
    return bullets, ellipses


def judge_c4(texts: Sequence[str]) -> tuple[Verdicts, list[str]]:
    """Return the verdicts, and the texts without the lines that C4 drops.

    As in C4's code, only a line kept so far can condemn the document.
    """
    found = Verdicts(len(texts))
    kept = [_lines(text) for text in texts]
    lorem = np.array([any("lorem ipsum" in line.lower() for line in lines) for lines in kept])
    curly = np.array([any("{" in line for line in lines) for lines in kept])
    found.refuse(lorem, "c4.lorem_ipsum", lorem)
    found.refuse(curly, "c4.curly_bracket", curly)
    # At least one per line, since every kept line ends one.
    sentences = np.array([sum(max(1, len(_SENTENCE_END.findall(each))) for each in lines) for lines in kept])
    found.refuse(sentences < MIN_SENTENCES, "c4.sentences", sentences)
    return found, ["\n".join(lines) for lines in kept]


def _lines(text: str) -> list[str]:
    lines = (_CITATION.sub("", line).strip() if "[" in line else line.strip() for line in text.splitlines())
    return [line for line in lines if _is_kept(line)]


def _is_kept(line: str) -> bool:
    """True for a line of prose: it ends a sentence, has words, and is no script or legal notice."""
    if not line.endswith(_C4_ENDS) or line.endswith("..."):
        return False
    words = line.split()
    if len(words) < MIN_WORDS_PER_LINE and not ("\u3000" <= line[-1] <= "\uffef"):
        return False
    lowered = line.lower()
    return (
        "javascript" not in lowered
        and not any(phrase in lowered for phrase in _POLICY)
        and max(map(len, words)) <= C4_MAX_WORD_LENGTH
    )


def judge_fineweb(texts: Sequence[str], batch: TextBatch) -> Verdicts:
    """Judge by the ends, lengths and repetition of lines, and by the number of lines per word."""
    found = Verdicts(len(texts))
    shares = np.array([_fineweb_line_shares(text) for text in texts]).reshape(-1, 3)
    punctuated, short, repeated = shares.T
    found.refuse(punctuated <= MIN_PUNCTUATED_LINES, "fineweb.punctuated_lines", punctuated)
    found.refuse(short >= MAX_SHORT_LINES, "fineweb.short_lines", short)
    found.refuse(repeated >= MAX_DUPLICATE_CHARS, "fineweb.duplicate_line_chars", repeated)
    newlines = np.array([text.count("\n") for text in texts])
    spread = newlines / np.maximum(batch.tokens.count(), 1)
    found.refuse(spread > MAX_LINES_PER_WORD, "fineweb.lines_per_word", spread)
    return found


def _fineweb_line_shares(text: str) -> tuple[float, float, float]:
    """Return the shares of lines that end a sentence, of short lines, and of characters in repeated lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return 0.0, 1.0, 0.0
    ends = sum(line.endswith(_FINEWEB_ENDS) for line in lines)
    short = sum(len(line) <= SHORT_LINE_CHARS for line in lines)
    repeated = sum(map(len, lines)) - sum(map(len, set(lines)))
    return ends / len(lines), short / len(lines), repeated / max(1, len(text) - text.count("\n"))
