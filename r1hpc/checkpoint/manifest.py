"""Read and write a checkpoint's manifest: each file's name, length and digest.

    <root>/step-00000120/manifest.json
        {"digest": "xxh3_128:...", "format": 1, "step": 120, "attempt": 3, "created": 1767225600.0,
         "files": [{"name": "rank_0.pt", "size": 81, "digest": "xxh3_128:..."}], "meta": {...}}

The file is JSON. Its first member, `digest`, covers every byte after that line, so a flipped digit in `meta`
(a data position, say) is found as surely as one in a weight. It guards against accidents; file ownership
guards against people who may write the folder.

Files are digested with xxh3_128 in 8 MiB pieces. xxh3_128 (https://github.com/Cyan4973/xxHash) is not
cryptographic; it finds accidents. It was chosen for speed: a save inside a 30 s preemption window must not
wait for hashing. Measurements: benchmarks/checkpoint_seal.py.
"""

import json
import os
import re
import stat
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from r1hpc.base.errors import StateError
from r1hpc.base.files import check_owned
from r1hpc.base.names import printable
from r1hpc.checkpoint.disk import patiently

CHUNK_BYTES = 8 * 2**20
DIGEST = re.compile(r"xxh3_128:[0-9a-f]{32}")
MANIFEST_NAME = "manifest.json"
FORMAT = 1
_HEAD = re.compile(rb'\{\n "digest": "(xxh3_128:[0-9a-f]{32})",\n')
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def digest_bytes(raw: bytes) -> str:
    return f"xxh3_128:{xxhash.xxh3_128(raw).hexdigest()}"


def digest_fd(fd: int) -> tuple[int, str]:
    """Return (size in bytes, digest) of an open file, from its start."""
    state = xxhash.xxh3_128()
    # One byte more than the file: a small file then needs no 8 MiB, and growth is still noticed.
    piece = memoryview(bytearray(min(CHUNK_BYTES, os.fstat(fd).st_size + 1)))
    size = 0
    os.lseek(fd, 0, os.SEEK_SET)
    while count := os.readv(fd, [piece]):
        state.update(piece[:count])
        size += count
    return size, f"xxh3_128:{state.hexdigest()}"


@dataclass(frozen=True)
class FileRecord:
    name: str
    """Relative POSIX path inside the checkpoint."""
    size: int
    """Bytes."""
    digest: str
    """`xxh3_128:` and 32 hexadecimal digits."""

    def __post_init__(self) -> None:
        check_file_name(self.name)
        if not isinstance(self.size, int) or self.size < 0:
            raise StateError(f"size {self.size!r} of {self.name} is not a number of bytes")
        if not isinstance(self.digest, str) or not DIGEST.fullmatch(self.digest):
            raise StateError(f"digest {self.digest!r} of {self.name} is not xxh3_128:<32 hex digits>")


@dataclass(frozen=True)
class Manifest:
    """The committed files. `meta` is the caller's, any JSON object."""

    step: int
    attempt: int
    created: float
    """Unix time of the commit by the writer's clock: for display, never for ordering."""
    files: tuple[FileRecord, ...]
    meta: dict[str, Any]

    @property
    def total_size(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(record.size for record in self.files)

    def share(self, rank: int, world_size: int) -> list[str]:
        """Return the files that `rank` verifies if `world_size` ranks split them, about equal in bytes."""
        loads = [0] * world_size
        mine = []
        for record in sorted(self.files, key=lambda r: (-r.size, r.name)):
            lightest = loads.index(min(loads))
            # + 1 spreads empty files as well.
            loads[lightest] += record.size + 1
            if lightest == rank:
                mine.append(record.name)
        return mine


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint with a readable manifest."""

    step: int
    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Candidate:
    """A `step-*` folder. If its manifest cannot be read, `checkpoint` is None and `problem` says why."""

    step: int
    path: Path
    checkpoint: Checkpoint | None
    problem: str = ""


def check_file_name(name: str) -> str:
    """Return `name` if it stays inside a checkpoint: relative, normalised, no control characters.

    Raise StateError for `..`, an absolute path, an empty part, a control character, or the manifest's own
    name.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or printable(name) != name or "\n" in name:
        raise StateError(f"{printable(str(name))!r} is not a file name inside a checkpoint")
    if name == MANIFEST_NAME:
        raise StateError(f"{MANIFEST_NAME} is written by the commit; give that file another name")
    return name


def step_folder(step: int) -> str:
    """Return the folder name, `step-00000120`."""
    return f"step-{step:08d}"


def step_of(folder: str) -> int | None:
    """Return the step of a folder named by step_folder; None for any other name."""
    found = _STEP_FOLDER.fullmatch(folder)
    return int(found[1]) if found and step_folder(int(found[1])) == folder else None


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json. Raise TypeError if `meta` holds something that is not JSON."""
    tail = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1).removeprefix("{\n").encode() + b"\n"
    return f'{{\n "digest": "{digest_bytes(tail)}",\n'.encode() + tail


def decode(raw: bytes, path: Path) -> Manifest:
    """Parse and check manifest.json.

    Raise StateError with `path` if it is not a manifest, or its digest does not match.
    """
    head = _HEAD.match(raw)
    if not head:
        raise StateError(f"{path} is truncated or not a manifest")
    if digest_bytes(raw[head.end() :]) != head[1].decode():
        raise StateError(f"{path} does not match its own digest: truncated or corrupt")
    body = json.loads(raw)
    if body.get("format") != FORMAT:
        raise StateError(f"{path} has format {body.get('format')!r}; this r1hpc reads format {FORMAT}")
    try:
        files = tuple(FileRecord(**record) for record in body["files"])
        for name, count in Counter(record.name for record in files).items():
            if count > 1:
                raise StateError(f"{name} is listed twice")
        if not isinstance(body["meta"], dict):
            raise TypeError("meta is not an object")
        step, attempt, created = int(body["step"]), int(body["attempt"]), float(body["created"])
        return Manifest(step, attempt, created, files, dict(body["meta"]))
    except (StateError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} cannot be used: {error}") from None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`, after checking its manifest but not its files.

    Raise StateError for a link, another user's folder, no readable manifest, or the manifest of another step.
    """
    file = path / MANIFEST_NAME

    def read() -> bytes:
        check_owned(path)
        check_owned(file)
        return read_plain(file)

    try:
        manifest = decode(patiently(read), file)
    except FileNotFoundError:
        raise StateError(f"{file} is missing") from None
    except OSError as error:
        raise StateError(f"{file} cannot be read: {error.strerror}") from None
    if manifest.step != step_of(path.name):
        raise StateError(f"{file} belongs to step {manifest.step}, not to this folder")
    return Checkpoint(manifest.step, path, manifest)


def examine(path: Path) -> Candidate:
    """Return the candidate in the step folder `path`, readable or not."""
    step = step_of(path.name)
    assert step is not None, "only step folders are examined"
    try:
        return Candidate(step, path, read_checkpoint(path))
    except StateError as error:
        return Candidate(step, path, None, str(error))


def read_plain(path: Path) -> bytes:
    """Read a regular file; follow no link, never block on a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StateError(f"{path} is not a plain file")
        return file.read()
