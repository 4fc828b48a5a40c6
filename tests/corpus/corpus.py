"""Small real datasets for the tests of this package."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from r1hpc.corpus.build.build import BuildReport, build_dataset

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rain",
    "falls",
    "on",
    "ünïcode",
    "roofs",
    "雨",
    "and",
    "nobody",
    "minds",
]


def text(number: int, num_words: int) -> str:
    """A document that is the same on every machine and unlike its neighbours."""
    seed = hashlib.sha256(str(number).encode()).digest()
    return " ".join(WORDS[(seed[i % 32] + i * (number + 1)) % len(WORDS)] for i in range(num_words))


def write_texts(root: Path, count: int = 12, num_words: int = 60) -> dict[str, str]:
    """Files root/docs/<n>.txt; returns their texts by relative path."""
    texts = {f"docs/{n:03d}.txt": text(n, num_words + n) for n in range(count)}
    for name, content in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return texts


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe over folder/docs with tiny chunks; `changes` replace top-level keys."""
    content: dict[str, Any] = {
        "name": "tiny",
        "tokenizer": {"kind": "bytes"},
        "sources": [
            {"name": "texts", "kind": "text", "root": ".", "glob": "docs/*.txt", "license": "CC0-1.0"}
        ],
        "chunk_tokens": 64,
        "shard_tokens": 512,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def build(folder: Path, name: str = "dataset", *, workers: int = 1, **changes: Any) -> BuildReport:
    """Texts, recipe and dataset in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "docs").exists():
        write_texts(folder)
    return build_dataset(write_recipe(folder, **changes), folder / name, workers=workers)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
