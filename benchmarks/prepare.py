"""Time the preparation of data: each stage by itself, and a build beside the tokenizer alone.

    python -m benchmarks.prepare [--megabytes 32]
    python -m benchmarks.prepare --megabytes 12 --tokenizer DIR     # with start-up, in processes of their own

Text is the running Python's standard library, repeated until there is enough. Prints CPU-seconds and ratios;
the throughput of one machine is not the point. Set TOKENIZERS_PARALLELISM=false for one thread.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.build.vocabulary import Encoder
from r1hpc.corpus.clean import rules
from r1hpc.corpus.clean import text as language
from r1hpc.corpus.clean import text as pii
from r1hpc.corpus.clean.batch import TextBatch
from r1hpc.corpus.clean.minhash import sign
from r1hpc.corpus.clean.text import repair
from r1hpc.corpus.recipe import PYTHON_STDLIB, MinhashRecipe, SourceRecipe, parse_recipe
from r1hpc.corpus.sources.read import list_spans, read_span

_BATCH_CHARS = 2**20
_VOCABULARY = 16_384


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=32, help="text to work on (default 32)")
    parser.add_argument("--tokenizer", type=Path, help="a folder: measure a build with it, start-up included")
    parser.add_argument("--repeats", type=int, default=5, help="with --tokenizer (default 5)")
    chosen = parser.parse_args()
    texts = collect_texts(chosen.megabytes * 10**6)
    if chosen.tokenizer:
        measure_with_start_up(texts, chosen.tokenizer.absolute(), chosen.repeats)
        return
    size = sum(map(len, texts)) / 1e6
    print(f"{len(texts):,} documents, {size:.1f} million characters")
    measure_stages(texts, size)
    measure_build(texts)


def collect_texts(num_chars: int) -> list[str]:
    """Documents of the standard library, over and over, each time a little different."""
    source = SourceRecipe(
        name="python", kind="text", root=PYTHON_STDLIB, glob="**/*.py", on_invalid_utf8="skip"
    )
    content: dict[str, Any] = {"name": "x", "tokenizer": {"kind": "bytes"}, "sources": []}
    recipe = parse_recipe(content | {"sources": [vars(source) | {"exclude": []}]}, Path())
    found, total = [], 0
    raws = [d.raw.decode("utf-8", "replace") for span in list_spans(recipe) for d in read_span(recipe, span)]
    while total < num_chars:
        for raw in raws:
            found.append(f"{total}\n{raw}")
            total += len(raw)
            if total >= num_chars:
                break
    return found


def measure_stages(texts: list[str], size: float) -> None:
    """Each stage alone, on batches as a build makes them."""
    batches = _batches(texts)
    stages: dict[str, Callable[[list[str]], Any]] = {
        "gopher (both)": _gopher,
        "c4": rules.judge_c4,
        "fineweb": lambda batch: rules.judge_fineweb(batch, TextBatch(batch)),
        "repair": lambda batch: [repair(text) for text in batch],
        "language": language.identify,
        "personal data": lambda batch: [pii.mask(text) for text in batch],
        "minhash": lambda batch: sign(TextBatch(batch, normal=True), MinhashRecipe()),
    }
    for name, stage in stages.items():
        seconds = _cpu(lambda stage=stage: [stage(batch) for batch in batches])  # type: ignore[misc]
        print(f"{name:14} {size / seconds:7.1f} MB a CPU-second")


def measure_build(texts: list[str]) -> None:
    """A build with a ready tokenizer, against the tokenizer's own encode_batch_fast on the same texts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "in.jsonl").write_text(lines)
        train = _recipe(folder, {"kind": "byte_bpe", "vocab_size": _VOCABULARY})
        first = build_dataset(train, folder / "trained").path / "tokenizer"
        encoder = Encoder(first / "tokenizer.json", "<|endoftext|>")
        alone = _cpu(lambda: [encoder._tokenizer.encode_batch_fast(batch) for batch in _batches(texts)])
        plain = _recipe(folder, {"kind": "path", "path": str(first)})
        built = _cpu(lambda: build_dataset(plain, folder / "plain"))
        ready = yaml.safe_load(plain.read_text())["tokenizer"]
        # No rules: code is not prose, and nothing would be left to tokenise.
        stages = _recipe(folder, ready, clean={"pii": "mask"}, dedup={"minhash": {}})
        prepared = _cpu(lambda: build_dataset(stages, folder / "prepared"))
        print(f"encode_batch_fast alone {alone:.1f} CPU-s")
        print(f"plain build    {built:.1f} CPU-s, {built / alone:.2f} x that")
        print(f"prepared build {prepared:.1f} CPU-s, {prepared / alone:.2f} x that")


_ALONE = """
import json, sys
from tokenizers import Tokenizer
tokenizer, batch, size = Tokenizer.from_file(sys.argv[2]), [], 0
for line in open(sys.argv[1]):
    batch.append(json.loads(line)["text"])
    size += len(batch[-1])
    if size >= 2**20:
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        batch, size = [], 0
tokenizer.encode_batch_fast(batch, add_special_tokens=False)
"""
"""A program that reads and encodes the lines, and keeps nothing."""


def measure_with_start_up(texts: list[str], tokenizer: Path, repeats: int) -> None:
    """CPU of `shard build` and of the tokenizers library alone, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        recipe = _recipe(folder, {"kind": "path", "path": str(tokenizer)})
        alone = [sys.executable, "-c", _ALONE, str(folder / "in.jsonl"), str(tokenizer / "tokenizer.json")]
        build = [sys.executable, "-m", "r1hpc.shard", "build", str(recipe), "--out"]
        took = [(_cpu_of([*build, str(folder / str(k))]), _cpu_of(alone)) for k in range(repeats)]
    built, encoded = (statistics.median(each) for each in zip(*took, strict=True))
    ratio = statistics.median(one / other for one, other in took)
    print(f"shard build {built:.2f} CPU-s, tokenizers alone {encoded:.2f}; median ratio {ratio:.2f}")


def _cpu_of(command: list[str]) -> float:
    """CPU-seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _recipe(folder: Path, tokenizer: dict[str, Any], **stages: Any) -> Path:
    content = {
        "name": "bench",
        "tokenizer": tokenizer,
        "sources": [{"name": "a", "kind": "jsonl", "root": ".", "glob": "*.jsonl"}],
        "part_bytes": 64 * 2**20,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | stages))
    return path


def _gopher(texts: list[str]) -> None:
    batch = TextBatch(texts)
    rules.quality(texts, batch, None)
    rules.repetition(batch)


def _batches(texts: list[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            batches.append([])
            size = 0
    return [batch for batch in batches if batch]


def _cpu(work: Callable[[], Any]) -> float:
    """CPU-seconds of this process, all its threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
