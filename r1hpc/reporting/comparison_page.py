"""Write one self-contained page that compares two models: the figures, and the questions they differ on.

write_page(pairs, ("base", "new"), (["400 questions"], headings, rows, ["no difference"]), Path("ab.html"))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.files import write_atomic
from r1hpc.reporting.style import card, document, lines, table, text

_MOST_SHOWN = 200
Line = Mapping[str, Any]


Figures = tuple[Sequence[str], Sequence[str], Sequence[Sequence[str]], Sequence[str]]
"""Sentences before the table, its headings, its rows, and sentences after it."""


def write_page(
    pairs: Sequence[tuple[Line, Line]], names: tuple[str, str], figures: Figures, path: Path
) -> None:
    """Write the page atomically.

    Args:
        pairs: the answers of both models to each question on which they differ; the first 200 are shown.
        figures: shown above them.
    """
    title = f"{names[0]} and {names[1]}"
    shown = pairs[:_MOST_SHOWN]
    more = f": {len(shown)} of {len(pairs)}" if len(shown) < len(pairs) else ""
    before, headings, rows, after = figures
    body = _paragraphs(before) + table(headings, rows, 1) + _paragraphs(after)
    head = [f"<h1>{text(title)}</h1>", card("Figures", body)]
    heading = f"<h2>Questions on which they differ{more}</h2>"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, document(title, [*head, heading, *(_question(pair, names) for pair in shown)]))


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{text(each)}</p>" for each in sentences)


def _question(pair: tuple[Line, Line], names: tuple[str, str]) -> str:
    question = pair[0]
    body = lines(str(question["prompt"]))
    for name, line in zip(names, pair, strict=True):
        body += f'<p class="sub">{text(name)}: {_result(line)}</p>{lines(str(line["greedy"]))}'
    return card(f"expected {question['expected']}", body)


def _result(line: Line) -> str:
    verdict = "right" if line["greedy_correct"] else "wrong"
    return f"greedy answer {verdict}, {line['num_correct']} of {line['num_samples']} samples right"
