"""Fit the estimator on the published runs, score it on families it has not seen, write both down.

    python -m research.estimator.fit             # r1hpc/plan/hours/coefficients.json and scores.md
    python -m research.estimator.fit --check     # exit status 1 where they are not what it would write

The same data give the same digits on every machine. The prose of the page is in page.py, its numbers are
those of the fit: change either here, not in scores.md.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.files import write_atomic
from r1hpc.plan.hours.mfu import COEFFICIENTS
from research.estimator.page import page
from research.estimator.published_rows import read_published
from research.estimator.scoring import fit_and_score

PAGE = Path(__file__).resolve().parent / "scores.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m research.estimator.fit", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; say whether anything would change"
    )
    arguments = parser.parse_args(argv)
    rows = read_published()
    found = fit_and_score(rows)
    texts = {COEFFICIENTS: json.dumps(found.coefficients, indent=1) + "\n", PAGE: page(rows, found)}
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path in changed:
        print(f"{'differs' if arguments.check else 'wrote'}: {path}")
        if not arguments.check:
            write_atomic(path, texts[path], mode=0o644)
    if not changed:
        print("nothing changed")
    return 1 if changed and arguments.check else 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
