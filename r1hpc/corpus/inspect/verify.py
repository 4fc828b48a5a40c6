"""Verify a dataset: every byte of every file, against the manifest and its own checksums.

for problem in verify_dataset(manifest):
    print(problem)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from r1hpc.data.format.documents import has_roles, read_lengths
from r1hpc.data.format.errors import DataError
from r1hpc.data.format.manifest import (
    ARRAYS,
    DATASET_ID,
    INPUT_STATES,
    LEFT_OUT,
    MADE_WITH,
    MANIFEST,
    PARTS,
    ROLE_ARRAYS,
    SEGMENT_ROLES,
    DatasetManifest,
    file_digest,
)
from r1hpc.data.format.zarr_shard import ArrayLayout, ShardFile, parse_layout


@dataclass(frozen=True)
class Problem:
    """One bad file, and which of its chunks are bad, if it has chunks."""

    file: str
    what: str
    chunks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify_dataset(
    manifest: DatasetManifest, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Problem]:
    """Yield every problem, file by file: missing, wrong size or sha256, chunks that fail their crc32c.

    For traces, roles that contradict the documents too. `advance` is called with the bytes of each file.
    """
    shards = _shards(manifest)
    bad: set[str] = set()
    for name, entry in sorted(manifest.files.items()):
        problem = _verify_file(manifest.path / name, name, entry["size"], entry["sha256"])
        if problem is not None:
            bad.add(name)
            yield _locate(problem, shards.get(name), entry["size"])
        advance(entry["size"])
    for part in manifest.parts if has_roles(manifest) else ():
        folder = f"{PARTS}/{part.name}"
        arrays = tuple(f"{folder}/{name}/" for name in ("doc_offsets", *ROLE_ARRAYS))
        if any(name.startswith(arrays) for name in bad):  # reported already
            continue
        try:
            read_lengths(manifest, part)
        except DataError as error:  # the files are sound: a faulty writer
            yield Problem(f"{folder}/{SEGMENT_ROLES}", str(error))


def unlisted_files(manifest: DatasetManifest) -> list[str]:
    """Return files in the folder that the manifest does not name: harmless, but not of the dataset."""
    known = set(manifest.files) | {MANIFEST, DATASET_ID, INPUT_STATES, MADE_WITH, LEFT_OUT}
    found = (path for path in manifest.path.rglob("*") if path.is_file())
    return sorted({path.relative_to(manifest.path).as_posix() for path in found} - known)


def _verify_file(path: Path, name: str, size: int, sha256: str) -> Problem | None:
    try:
        found = path.stat().st_size
        if found != size:
            return Problem(name, f"has {found} bytes, the manifest says {size}")
        if file_digest(path)["sha256"] != sha256:
            return Problem(name, "sha256 differs from the manifest")
    except (FileNotFoundError, NotADirectoryError):
        return Problem(name, "is missing")
    except OSError as error:
        return Problem(name, f"cannot be read ({error.strerror})")
    return None


def _shards(manifest: DatasetManifest) -> dict[str, tuple[ArrayLayout, int]]:
    """Return layout and shard number of every shard whose array metadata can be read."""
    shards: dict[str, tuple[ArrayLayout, int]] = {}
    for part in manifest.parts:
        for array in (*ARRAYS, *(ROLE_ARRAYS if has_roles(manifest) else ())):
            folder = f"{PARTS}/{part.name}/{array}"
            try:
                layout = parse_layout(manifest.path / folder, manifest.read_file(f"{folder}/zarr.json"))
            except DataError:  # reported as a file; its shards are still checked by sha256
                continue
            for number in range(layout.num_shards):
                name = layout.shard_path(number).relative_to(manifest.path).as_posix()
                shards[name] = (layout, number)
    return shards


def _locate(problem: Problem, shard: tuple[ArrayLayout, int] | None, size: int) -> Problem:
    """Return the problem with the bad chunks, if the shard's index can tell."""
    if shard is None or "sha256" not in problem.what:
        return problem
    layout, number = shard
    file = ShardFile(layout, number, size)
    try:
        file.open()
    except DataError as error:
        return Problem(problem.file, f"{problem.what}; {str(error).split('; ')[0]}")
    bad = []
    for chunk in range(layout.chunks_per_shard):
        try:
            file.read_chunk(chunk)
        except DataError:
            bad.append(chunk)
    if not bad:
        return Problem(problem.file, f"{problem.what}, though each chunk is sound: another dataset's shard?")
    listed = ", ".join(str(chunk) for chunk in bad[:20]) + (", ..." if len(bad) > 20 else "")
    return Problem(problem.file, f"{problem.what}; bad chunks: {listed}", tuple(bad))
