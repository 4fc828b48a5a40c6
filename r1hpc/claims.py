"""The article's claims beside what was measured here, as a page.

    python -m r1hpc.claims --out docs/claims.md
    python -m r1hpc.claims --results DIR        # of your own: r1hpc ablate NAME --out DIR/NAME.json

Without --out the page is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, print_json, run_door
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_atomic


def main(argv: Sequence[str]) -> int:
    """Make the page and print or write it."""
    from r1hpc.chain.claims import MEASURED, claims_page, is_measured, read_measured
    from r1hpc.chain.claims_list import CLAIMS

    arguments = _arguments(argv)
    folder = Path(arguments.results) if arguments.results else MEASURED
    if arguments.results and not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}: give --results the one that r1hpc ablate --out wrote to"
        )
    found = read_measured(folder)
    page = claims_page(found)
    if arguments.out:
        write_atomic(Path(arguments.out), page, mode=0o644)
    if arguments.json:
        rows = [
            {"claim": c.title, "verdict": c.verdict.value, "measured": is_measured(c, found)} for c in CLAIMS
        ]
        print_json({"out": arguments.out, "ablations": sorted(found), "claims": rows})
    elif not arguments.out:
        sys.stdout.write(page)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m r1hpc.claims", description=__doc__)
    parser.add_argument("--out", metavar="FILE", help="write the page there instead of printing it")
    parser.add_argument("--results", metavar="DIR", help="results to tell of; default: those kept in r1hpc")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout: what was measured")
    arguments: argparse.Namespace = parser.parse_args(list(argv))
    return arguments


if __name__ == "__main__":
    run_door(main)
