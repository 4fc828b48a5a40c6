"""A corpus through all stages of a recipe: documents a second, whether that stays so, and memory a worker.

    python -m benchmarks.corpus [--gigabytes 0.2] [--workers 2] [--folder DIR]

Text is made up: words of the standard library in Zipf's shares, one document in ten nearly a copy of another,
one in twenty with an address in it. It goes through repair, language, rules, masking, near deduplication and
a BPE. For each stage: CPU-seconds, documents a CPU-second in the first and in the second half of its units,
and the largest memory of a process after any of them. --gigabytes 10 takes some 30 GB of disk below --folder.
"""

import argparse
import functools
import json
import multiprocessing
import random
import re
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from r1hpc.base.units import format_bytes
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.engine import units as engine
from r1hpc.corpus.engine.work_dir import DONE
from r1hpc.corpus.inspect.describe import audit

_FILE_BYTES = 16 * 2**20
_NUM_WORDS = 20_000
RECIPE: dict[str, Any] = {
    "name": "corpus",
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 16_384},
    "sources": [{"name": "made-up", "kind": "jsonl", "root": ".", "glob": "*.jsonl"}],
    "clean": {"lang": ["en"], "min_lang_score": 0.0, "rules": ["gopher", "c4", "fineweb"], "pii": "mask"},
    "dedup": {"exact": True, "minhash": {}},
    "part_bytes": _FILE_BYTES,
}


def main() -> None:
    """Print a line for each stage, and what a terabyte would take at that rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=0.2, help="of text (default 0.2)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--folder", type=Path, help="where it all lies meanwhile (default: the system's)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        num_bytes = write_corpus(Path(name), round(chosen.gigabytes * 1e9), chosen.workers)
        measure(Path(name), num_bytes, chosen.workers)


def write_corpus(folder: Path, num_bytes: int, workers: int) -> int:
    """JSON lines in files of a part each; how many bytes of text."""
    sizes = [min(_FILE_BYTES, num_bytes - begin) for begin in range(0, num_bytes, _FILE_BYTES)]
    paths = [folder / f"{number:05d}.jsonl" for number in range(len(sizes))]
    with multiprocessing.Pool(workers) as pool:
        return sum(pool.starmap(_write_file, zip(paths, sizes, range(len(sizes)), strict=True)))


def _write_file(path: Path, num_bytes: int, seed: int) -> int:
    documents, size = _documents(random.Random(seed)), 0
    with path.open("w") as file:
        while size < num_bytes:
            text = next(documents)
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
    return size


def measure(folder: Path, num_bytes: int, workers: int) -> None:
    """Build, and say what it took."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    done: dict[str, list[dict[str, Any]]] = {}
    began = time.monotonic()
    with patch.object(engine, "make_units", functools.partial(_noted, done, engine.make_units)):
        report = build_dataset(recipe, folder / "out", workers=workers)
    took_s = time.monotonic() - began
    documents = audit(report.path)["documents"]
    print(f"{num_bytes / 1e9:.2f} GB, {documents['in']:,} documents, {workers} workers: {took_s:.0f} s")
    print(f"kept {documents['kept']:,}; dropped {documents['dropped']}")
    for stage, units in done.items():
        _print_stage(stage, units)
    cpu_s = sum(unit["cpu_s"] for units in done.values() for unit in units)
    print(f"in all {documents['in'] / took_s:,.0f} documents a second, {cpu_s:,.0f} CPU-seconds")
    print(f"a terabyte at this rate: {cpu_s / num_bytes * 1e12 / 3600:,.0f} CPU-hours")


def _noted(
    done: dict[str, list[dict[str, Any]]],
    make: Callable[..., Iterator[engine.Unit]],
    folder: Path,
    *more: Any,
) -> Iterator[engine.Unit]:
    """Make units, and note what each leaves on record, in the order in which they end."""
    for unit in make(folder, *more):
        path = folder / "units" / unit.stage / unit.key / DONE
        done.setdefault(unit.stage, []).append(json.loads(path.read_text()))
        yield unit


def _print_stage(stage: str, units: list[dict[str, Any]]) -> None:
    half = len(units) // 2
    rates = [_rate(part) for part in (units[:half], units[half:])] if half else []
    said = f", documents a CPU-second {rates[0]:,.0f}, then {rates[1]:,.0f}" if all(rates) and rates else ""
    memory = format_bytes(max(unit["peak_memory_bytes"] for unit in units))
    cpu_s = sum(unit["cpu_s"] for unit in units)
    print(f"  {stage:10} {len(units):4} units {cpu_s:8.1f} CPU-s, at most {memory} a process{said}")


def _rate(units: list[dict[str, Any]]) -> float:
    """Documents a CPU-second; 0 where the units do not count them."""
    records = [unit["record"] for unit in units]
    count = sum(record.get("in") or record.get("num_documents") or 0 for record in records)
    return float(count / max(1e-9, sum(unit["cpu_s"] for unit in units)))


def _documents(draw: random.Random) -> Iterator[str]:
    """Without end."""
    words, shares = _words()
    last = ""
    while True:
        text = last
        if draw.random() < 0.9 or not last:
            sentences = [_sentence(draw, words, shares) for _ in range(draw.randint(10, 60))]
            last = text = "\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))
        else:
            text = text.replace(" the ", " that ", 1)
        yield f"{text} Write to jane.{draw.randrange(10**6)}@example.org." if draw.random() < 0.05 else text


def _sentence(draw: random.Random, words: list[str], shares: list[float]) -> str:
    """Short words of English between what is drawn, as the rules ask for."""
    drawn = draw.choices(words, cum_weights=shares, k=draw.randint(8, 24))
    for at in range(0, len(drawn), 3):
        drawn[at] = draw.choice(("the", "of", "and", "to", "that", "with", "be", "have"))
    return f"{' '.join(drawn).capitalize()}."


@functools.cache
def _words() -> tuple[list[str], list[float]]:
    """The commonest words of the standard library's sources, and their cumulated shares by Zipf's law."""
    counts: Counter[str] = Counter()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        counts.update(re.findall(r"\b[a-z]{3,12}\b", path.read_text(errors="replace")))
    words = [word for word, _ in counts.most_common(_NUM_WORDS)]
    return words, list(accumulate(1 / rank for rank in range(1, len(words) + 1)))


if __name__ == "__main__":
    main()
