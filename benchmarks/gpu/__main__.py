"""Run the pieces of benchmarks/gpu, and write results.md.

    python -m benchmarks.gpu                        # all, one after the other, each in a process of its own
    python -m benchmarks.gpu speed decode           # some
    python -m benchmarks.gpu --device cpu           # in small, without a card
    python -m benchmarks.gpu --list

A piece that fails is put on the page with what it said, and the next one goes on; exit status 1 then. Figures
are kept in FOLDER/figures, so that pieces can be run on other days.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.page import write_page
from benchmarks.gpu.place import CHECKOUT, Place, facts
from benchmarks.gpu.table import Result, Table, load, save
from r1hpc.base.errors import R1hpcError

Piece = Callable[[Place], list[Table]]
PIECES = {
    "install": "libraries, device, and how fast it multiplies",
    "tests": "every test marked gpu",
    "precision": "each precision under each stage of ZeRO, or why not",
    "same": "the same run twice, stopped and resumed; deterministic or not",
    "rl": "reinforcement learning at ZeRO 0 and 3: sampler and trainer agree",
    "memory": "peaks of an update and a rollout, beside the plan",
    "speed": "MFU by model size and sequence length",
    "decode": "milliseconds a token by rows",
    "saves": "what a save costs, and how long a restart takes",
    "nvml": "NVML beside nvidia-smi",
    "nccl": "collectives between two GPUs, a rank that hangs, another number of ranks",
    "chain": "the R1 chain with a kill in it",
    "quantize": "exports in integers: the same as on the CPU, and how long they take",
    "vllm": "rollouts by vLLM, in an environment of its own",
}
LIMIT_S = 600


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.list:
        print("\n".join(f"{name:10} {words}" for name, words in PIECES.items()))
        return 0
    chosen = arguments.pieces or list(PIECES)
    if unknown := [name for name in chosen if name not in PIECES]:
        print(f"no piece {unknown[0]!r}; there are {', '.join(PIECES)}", file=sys.stderr)
        return 2
    if len(chosen) == 1:
        is_well = run_piece(chosen[0], arguments.device, arguments.folder)
    else:
        went_well = [_in_its_own_process(name, arguments) for name in chosen]  # each, also after a failure
        is_well = all(went_well)
    write_page(arguments.page, arguments.folder / "figures", list(PIECES))
    print(f"{arguments.page} is written")
    return 0 if is_well else 1


def run_piece(name: str, device: str, folder: Path) -> bool:
    """Run one here and keep its figures; whether it ended well."""
    started, tables, failure = time.monotonic(), [], ""
    print(f"== {name}: {PIECES[name]}", flush=True)
    try:
        tables = _piece(name)(_place(device, folder))
    except R1hpcError as error:
        failure = str(error)
    except Exception:  # the next pieces, and the page, must not be lost with it
        failure = traceback.format_exc(limit=-3)
    taken_s = time.monotonic() - started
    command = f"python -m benchmarks.gpu {name} --device {device}"
    save(folder / "figures", Result(name, command, taken_s, tuple(tables), facts(device), failure))
    for table in tables:
        print(_as_text(table), flush=True)
    print(failure or f"{name}: {taken_s:.0f} s", flush=True)
    return not failure


def _piece(name: str) -> Piece:
    piece: Piece = import_module(f"benchmarks.gpu.{name}").run
    return piece


def _place(device: str, folder: Path) -> Place:
    import torch

    num = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and not num:
        raise R1hpcError("torch finds no GPU here; --device cpu runs the pieces in small")
    runs = folder / device
    runs.mkdir(parents=True, exist_ok=True)
    return Place(device, num, runs.absolute())


def _in_its_own_process(name: str, arguments: argparse.Namespace) -> bool:
    """A piece that leaves memory behind, hangs or crashes costs no other one anything."""
    figures = arguments.folder / "figures"
    (figures / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--device", arguments.device]
    command += ["--folder", str(arguments.folder), "--page", str(arguments.page)]
    try:
        status: int | str = subprocess.run(command, cwd=CHECKOUT, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        status = f"it took longer than {LIMIT_S} s"
    if load(figures, name) is None:  # it could not write down itself how it ended
        save(figures, Result(name, " ".join(command), 0.0, (), facts(arguments.device), f"ended: {status}"))
    return status == 0


def _as_text(table: Table) -> str:
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([table.title, *(f"  {line}" for line in lines), *table.notes])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = os.environ.get("OUT")
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(out or "runs") / "gpu", help="runs and figures")
    page = Path(out) / "gpu.md" if out else CHECKOUT / "benchmarks" / "gpu" / "results.md"
    parser.add_argument(
        "--page", type=Path, default=page, help="default $OUT/gpu.md, else benchmarks/gpu/results.md"
    )
    parser.add_argument("--list", action="store_true", help="which pieces there are")
    return parser


if __name__ == "__main__":
    sys.exit(main())
