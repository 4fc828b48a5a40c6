"""Small datasets of traces for the tests of this package: bytes as tokens, so that ids can be read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1hpc.corpus.build.build import BuildReport, build_dataset
from tests.corpus.corpus import text, write_recipe

Pair = tuple[str, str]
EOS = 256


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Prompts and completions of all lengths from one character on."""
    made = [text(seed + n, 12) for n in range(count)]
    return [(made[n][: 1 + n % 13], made[n][::-1][: 1 + (7 * n) % 31]) for n in range(count)]


def write_traces(path: Path, traces: Sequence[Pair], **extra: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "completion": done} | extra) for prompt, done in traces]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def trace_source(**changes: Any) -> dict[str, Any]:
    return {"name": "traces", "kind": "traces", "root": ".", "glob": "*.jsonl"} | changes


def build_traces(folder: Path, traces: Sequence[Pair], name: str = "dataset", **changes: Any) -> BuildReport:
    """One file of traces, its recipe and its dataset in one folder; `changes` replace the recipe's keys."""
    write_traces(folder / "a.jsonl", traces)
    recipe = write_recipe(folder, **({"sources": [trace_source()]} | changes))
    return build_dataset(recipe, folder / name)


def expected_ids(trace: Pair) -> tuple[list[int], int]:
    """What the bytes tokenizer makes of a trace, and how many of the ids are the prompt."""
    prompt, completion = (list(part.encode()) for part in trace)
    return [*prompt, *completion, EOS], len(prompt)
