"""Read and write the manifest: a dataset's content, file by file, and its id.

    manifest = read_manifest(Path("data/stdlib"))
    manifest.id                     # sha256 of manifest.json, which lists the sha256 of everything else

It holds no time, no host and no absolute path, so the same recipe over the same inputs gives the same id
anywhere. The constants name the files and folders of a dataset.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from r1hpc.base.files import write_atomic
from r1hpc.data.format.errors import DataError, DatasetMissingError, ShardCorruptError, ShardMissingError

MANIFEST = "manifest.json"
DATASET_ID = "dataset_id"
FORMAT = "r1hpc-tokens/1"
REPAIR = (
    "restore it from a copy or rebuild the dataset (python -m r1hpc.shard verify DIR lists all bad files)"
)
PARTS = "parts"
TOKENS = "tokens"
CHECKSUMS = "tokens.crc32c"
INPUTS = "inputs.json"
TOKENIZER = "tokenizer"
DECISIONS = "decisions.parquet"
MADE_WITH = "made_with.json"
"""Digests of files beside the inputs, to notice that they have changed. No part of the dataset or its id."""
INPUT_STATES = "input_states.json"
"""Size, time and, if requested, digest of each input. No part of the dataset or its id."""
LEFT_OUT = "left_out.json"
"""Records left out by a plain recipe, by source and rule. No part of the dataset or its id, which counts only
some of them, under one rule."""
SEGMENT_OFFSETS = "seg_offsets"
SEGMENT_ROLES = "seg_role"
ARRAYS = (TOKENS, "doc_offsets", "doc_source", "doc_hash", "doc_input", "doc_position")
ROLE_ARRAYS = (SEGMENT_OFFSETS, SEGMENT_ROLES)
"""Only datasets of traces have these."""


@dataclass(frozen=True)
class DatasetPart:
    """A contiguous run of documents by one writer."""

    name: str
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class DatasetManifest:
    """A parsed manifest.json together with the folder it describes."""

    path: Path
    id: str
    content: dict[str, Any]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return relative path -> {"size": bytes, "sha256": hex}."""
        return dict(self.content["files"])

    @cached_property
    def parts(self) -> tuple[DatasetPart, ...]:
        return tuple(DatasetPart(**part) for part in self.content["parts"])

    def file_entry(self, name: str) -> dict[str, Any]:
        """Return size and digest of one file; ShardCorruptError if the manifest does not list it."""
        entry: dict[str, Any] | None = self.content["files"].get(name)
        if entry is None:
            raise ShardCorruptError(f"{self.path / MANIFEST} does not list {name}; rebuild the dataset")
        return entry

    def read_file(self, name: str) -> bytes:
        """Return the complete content of a listed file, verified by its sha256.

        Raise ShardMissingError if it is gone; ShardCorruptError if the manifest names other bytes.
        """
        try:
            raw = (self.path / name).read_bytes()
        except FileNotFoundError:
            raise missing(self.path / name) from None
        if hashlib.sha256(raw).hexdigest() != self.file_entry(name)["sha256"]:
            raise ShardCorruptError(f"{self.path / name}: sha256 differs from the manifest; {REPAIR}")
        return raw

    def check_census(self) -> None:
        """Raise ShardMissingError or ShardCorruptError unless each listed file has its size; reads none."""
        for name, entry in self.content["files"].items():
            path, size = self.path / name, entry["size"]
            try:
                found = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise missing(path) from None
            if found != size:
                raise ShardCorruptError(f"{path} has {found} bytes, the manifest says {size}; {REPAIR}")


def missing(path: Path) -> ShardMissingError:
    return ShardMissingError(f"{path} is missing; {REPAIR}")


def canonical_json(value: Any) -> bytes:
    """Return the one byte string of a JSON value: sorted keys, no spaces, ASCII, newline at the end."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> str:
    """Write manifest.json and dataset_id; return the id."""
    raw = canonical_json(content)
    dataset_id = hashlib.sha256(raw).hexdigest()
    write_atomic(folder / MANIFEST, raw, mode=0o644)
    write_atomic(folder / DATASET_ID, dataset_id + "\n", mode=0o644)
    return dataset_id


def read_manifest(folder: Path) -> DatasetManifest:
    """Parse and verify DIR/manifest.json.

    Raise DatasetMissingError if there is none, ShardCorruptError if it does not hash to DIR/dataset_id or is
    not a manifest, DataError if it was written by a format this version cannot read.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetMissingError(
            f"no dataset in {folder} ({MANIFEST} is not there); "
            f"build one: python -m r1hpc.shard build RECIPE --out {folder}"
        ) from None
    dataset_id = hashlib.sha256(raw).hexdigest()
    try:
        stored = (folder / DATASET_ID).read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        stored = ""
    if stored != dataset_id:
        raise ShardCorruptError(
            f"{folder / MANIFEST} hashes to {dataset_id[:12]} but {DATASET_ID} says "
            f"{stored[:12] or 'nothing'}; one of the two was changed: restore or rebuild the dataset"
        )
    content = json.loads(raw)
    if content.get("format") != FORMAT:
        raise DataError(f"{folder} has format {content.get('format')!r}, this version reads {FORMAT!r}")
    for name in [*content["files"], *(part["name"] for part in content["parts"])]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ShardCorruptError(f"{folder / MANIFEST}: {name!r} is outside of the folder; {REPAIR}")
    return DatasetManifest(folder, dataset_id, content)


def census(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file below a folder, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def file_digest(path: Path) -> dict[str, Any]:
    """Return the census entry of one file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def part_name(number: int) -> str:
    return f"part-{number:05d}"
