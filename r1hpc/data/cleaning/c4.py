"""The rules of C4 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2).

Lines are dropped from a document before it is judged. The removal of repeated three-sentence spans is left
out; `dedup` compares documents. Sentences are counted by their ends, not by a tagger.
"""

import re
from collections.abc import Sequence

import numpy as np

from r1hpc.data.cleaning.verdict import Verdicts

MIN_SENTENCES = 5
MIN_WORDS_PER_LINE = 3
MAX_WORD_LENGTH = 1000

_ENDS = (".", "?", "!", '"', "'", "\u201d", "\u3002", "\uff1f", "\uff01")
_POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d)\]]*(?=\s|$)|[\u3002\uff1f\uff01]+")


def judge(texts: Sequence[str]) -> tuple[Verdicts, list[str]]:
    """The verdicts, and the texts without the lines that C4 leaves out.

    As in the code of C4, only a line that is kept so far can condemn the document.
    """
    found = Verdicts(len(texts))
    kept = [_lines(text) for text in texts]
    lorem = np.array([any("lorem ipsum" in line.lower() for line in lines) for lines in kept])
    curly = np.array([any("{" in line for line in lines) for lines in kept])
    found.refuse(lorem, "c4.lorem_ipsum", lorem)
    found.refuse(curly, "c4.curly_bracket", curly)
    sentences = np.array([_sentences(lines) for lines in kept])
    found.refuse(sentences < MIN_SENTENCES, "c4.sentences", sentences)
    return found, ["\n".join(lines) for lines in kept]


def _sentences(lines: Sequence[str]) -> int:
    """At least one a line, since every line that is kept ends one."""
    return sum(max(1, len(_SENTENCE_END.findall(line))) for line in lines)


def _lines(text: str) -> list[str]:
    return [line for line in map(_without_citations, text.splitlines()) if _is_kept(line)]


def _without_citations(line: str) -> str:
    return _CITATION.sub("", line).strip() if "[" in line else line.strip()


def _is_kept(line: str) -> bool:
    """Whether a line is one of prose: it ends a sentence, has words, and is no script or legal notice."""
    if not line.endswith(_ENDS) or line.endswith("..."):
        return False
    words = line.split()
    if len(words) < MIN_WORDS_PER_LINE and not ("\u3000" <= line[-1] <= "\uffef"):
        return False
    lowered = line.lower()
    return (
        "javascript" not in lowered
        and not any(phrase in lowered for phrase in _POLICY)
        and max(map(len, words)) <= MAX_WORD_LENGTH
    )
