"""The rules that FineWeb adds (Penedo et al. 2024, "The FineWeb Datasets", section 3.6): about lines."""

from collections.abc import Sequence

import numpy as np

from r1hpc.data.cleaning.batch import TextBatch
from r1hpc.data.cleaning.verdict import Verdicts

MIN_PUNCTUATED_LINES = 0.12
MAX_SHORT_LINES = 0.67
SHORT_LINE_CHARS = 30
MAX_DUPLICATE_CHARS = 0.1
"""The paper's text says 0.1; datatrove's default is 0.01."""
MAX_LINES_PER_WORD = 0.3

_ENDS = (*".?!", "\u2026", "\u3002", "\uff0e", "\uff1f", "\uff01", "\u0964", "\u061f", "\u06d4", "\u1362")


def judge(texts: Sequence[str], batch: TextBatch) -> Verdicts:
    """Judge by the ends, lengths and repetition of lines, and by how many lines the words are spread over."""
    found = Verdicts(len(texts))
    shares = np.array([_line_shares(text) for text in texts]).reshape(-1, 3)
    punctuated, short, repeated = shares.T
    found.refuse(punctuated <= MIN_PUNCTUATED_LINES, "fineweb.punctuated_lines", punctuated)
    found.refuse(short >= MAX_SHORT_LINES, "fineweb.short_lines", short)
    found.refuse(repeated >= MAX_DUPLICATE_CHARS, "fineweb.duplicate_line_chars", repeated)
    newlines = np.array([text.count("\n") for text in texts])
    spread = newlines / np.maximum(batch.tokens.count(), 1)
    found.refuse(spread > MAX_LINES_PER_WORD, "fineweb.lines_per_word", spread)
    return found


def _line_shares(text: str) -> tuple[float, float, float]:
    """Lines that end a sentence, lines that are short, characters in lines that were there before."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return 0.0, 1.0, 0.0
    ends = sum(line.endswith(_ENDS) for line in lines)
    short = sum(len(line) <= SHORT_LINE_CHARS for line in lines)
    repeated = sum(map(len, lines)) - sum(map(len, set(lines)))
    return ends / len(lines), short / len(lines), repeated / max(1, len(text) - text.count("\n"))
