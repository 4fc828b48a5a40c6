"""results.md: what the pieces left, with card, driver and versions; what has not run says so.

write_page(Path("benchmarks/gpu/results.md"), results_folder, ["install", "tests", ...])
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.table import Result, Table, load
from r1hpc.base.files import write_atomic

_HEAD = """\
# On a GPU

    make gpu                 # on a machine with one or more GPUs; it writes this page
    make gpu PIECE=NAME      # run one piece again, at most ten minutes, and replace its part

Each piece names the card, the driver and the versions.
"""
_NEVER = """
**No figure here is from a GPU yet: nothing of this has run on one.** The pieces ran with small sizes on CPUs
(`python -m benchmarks.gpu --device cpu`; `tests/test_gpu_pieces.py` runs the quick ones). Their parts with
NCCL, CUDA kernels, NVML and vLLM never ran.
"""


def write_page(path: Path, results: Path, pieces: Sequence[str]) -> None:
    """Replace the page; pieces in this order."""
    write_atomic(path, page(results, pieces), mode=0o644)


def page(results: Path, pieces: Sequence[str]) -> str:
    """Figures of a CPU stand only on a page that has none of a card."""
    found = [result for name in pieces if (result := load(results, name)) is not None]
    on_card = [result for result in found if not _is_small(result)]
    shown = {result.piece: result for result in on_card}
    lines = [_HEAD] if on_card else [_HEAD + _NEVER]
    for name in pieces:
        lines += _section(name, shown.get(name))
    return "\n".join(lines)


def _is_small(result: Result) -> bool:
    return result.facts.get("card", "").startswith("none")


def _section(name: str, result: Result | None) -> Iterator[str]:
    yield f"## {name}\n"
    if result is None:
        yield "Has not run.\n"
        return
    if result.failure:
        yield f"**Failed:**\n\n    {'    '.join(result.failure.splitlines(keepends=True))}\n"
    for table in result.tables:
        yield from _table(table)
    ran_on = ", ".join(f"{key} {value}" for key, value in result.facts.items())
    yield f"`{result.command}`, {result.seconds:.0f} s; {ran_on}\n"


def _table(table: Table) -> Iterator[str]:
    yield f"{table.title}\n"
    yield _row(table.header)
    yield _row(["---"] * len(table.header))
    yield from map(_row, table.rows)
    yield ""
    yield from (f"{note}\n" for note in table.notes)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
