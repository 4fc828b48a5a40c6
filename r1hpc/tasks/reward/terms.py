"""Define the named terms of a reward. Each is a number from 0 to 1 for one completion.

A new term is a function here and a line in TERMS; every term is logged by its name. Its docstring cites the
literature or the article, and says what it is worth.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.tasks.grading.completion import without_tags
from r1hpc.tasks.problems.task import Item

_MAX_TEXT = 1 << 16
"""Characters that the terms on text read: bounds their time, far above any completion's length."""
_WORD = re.compile(r"[^\W\d_]+|\S")


@dataclass(frozen=True)
class Completion:
    """A policy's text after the prompt. `num_tokens` counts its end token; `truncated` text lacks one."""

    text: str
    num_tokens: int
    truncated: bool


@dataclass(frozen=True)
class Judged:
    """A completion with all that a term may use."""

    item: Item
    completion: Completion
    correct: bool
    well_formed: bool
    max_completion_length: int
    overlong_share: float = 0.2


Term = Callable[[Judged], float]


def accuracy(judged: Judged) -> float:
    """Return 1 for a right answer (DeepSeek-R1's rule-based reward)."""
    return float(judged.correct)


def well_formed(judged: Judged) -> float:
    """Return 1 for `<think>..</think><answer>..</answer>` and an end; the Scorer may gate it."""
    return float(judged.well_formed)


def language(judged: Judged) -> float:
    """Return the share of the completion's letters in the prompt's script; 1 if either has no letters.

    DeepSeek-R1 counts words of the target language, to stop a chain of thought from mixing two; letters need
    no word list. The script is the first word of a letter's Unicode name; Japanese counts as CJK.
    """
    wanted = _scripts(judged.item.prompt)
    written = _scripts(without_tags(judged.completion.text[:_MAX_TEXT]))
    if not wanted or not written:
        return 1.0
    (script, _), *_ = wanted.most_common(1)
    return written[script] / written.total()


def efficiency_tokens(judged: Judged) -> float:
    """Return 1 - length / longest length: an efficiency reward that distinguishes completions."""
    return max(0.0, 1.0 - judged.completion.num_tokens / judged.max_completion_length)


def diversity(judged: Judged) -> float:
    """Return the entropy of the completion's bigrams over that of as many different ones; 0 for under two.

    The article's "n-gram entropy" with n = 2. A word is a run of letters; each digit or sign is one too.
    Tags do not count: they are the same everywhere.
    """
    words = _WORD.findall(without_tags(judged.completion.text[:_MAX_TEXT]))
    counts = Counter(pairwise(words))
    total = counts.total()
    if total < 2:
        return 0.0
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    return min(1.0, max(0.0, entropy / math.log(total)))


def overlong(judged: Judged) -> float:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to a length, then down to -1.

    Truncated text gets -1. The paper uses 4,096 of 20,480 tokens, a fifth, and adds it to an accuracy of 1 or
    -1; beside an accuracy of 1 or 0 the same is a weight of 0.5.
    """
    longest = judged.max_completion_length
    buffer = judged.overlong_share * longest
    return (
        -1.0
        if judged.completion.truncated
        else min(0.0, (longest - judged.completion.num_tokens) / buffer - 1)
    )


TERMS: dict[str, Term] = {
    "accuracy": accuracy,
    "format": well_formed,
    "language": language,
    "efficiency_tokens": efficiency_tokens,
    "diversity": diversity,
    "overlong": overlong,
}


def term_named(name: str) -> Term:
    """Return the term of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TERMS:
        raise UsageError(
            f"reward.terms.{name} is unknown{nearest(name, TERMS)}; the terms are: {', '.join(TERMS)}"
        )
    return TERMS[name]


def _scripts(text: str) -> Counter[str]:
    scripts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            scripts[_script(char)] += count
    return scripts


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """Return LATIN, GREEK, CYRILLIC, CJK ... Full-width and mathematical letters count as plain ones."""
    plain = unicodedata.normalize("NFKC", char)[:1]
    word = unicodedata.name(plain, "UNKNOWN").split("-")[0].split()[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA") else word
