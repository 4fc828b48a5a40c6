"""Publish the policy's weights as numbered versions in files, and read them verified.

    latest = publish(exchange, 7, served_weights(policy), token)        # the trainer, on rank 0
    latest = read_latest(exchange)                                      # a worker, each round
    weights = load_version(exchange, latest)

A folder v-<version>-<token of the attempt> appears by one rename, then latest.json announces it. Nothing
is replaced, so latest.json names a version that is there, whenever the trainer is killed. Readers list no
folder: NFS may remember for a minute that a name was missing. The digest covers names, shapes and bits.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict, cast

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from r1hpc.base.errors import StateError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import fsync_dir, fsync_file, read_object, write_json
from r1hpc.base.names import check_name

_WEIGHTS = "model.safetensors"
_LATEST = "latest.json"


class Latest(TypedDict):
    """latest.json: the newest version, its digest, and the token of the attempt that published it."""

    version: int
    digest: str
    token: str


def publish(exchange: Path, version: int, weights: Iterable[tuple[str, torch.Tensor]], token: str) -> Latest:
    """Write a version and announce it; an attempt publishes each once. Call it only while the attempt holds
    the run's fence: latest.json has one writer."""
    folder = version_dir(exchange, version, token)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700, parents=True)
    # Clones: a tied output head is published under both names, and safetensors refuses shared memory.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights}
    save_file(tensors, temporary / _WEIGHTS)
    fsync_file(temporary / _WEIGHTS)
    fsync_dir(temporary)
    failpoint("version.rename")
    temporary.rename(folder)
    fsync_dir(exchange)
    failpoint("version.announce")
    latest = Latest(version=version, digest=digest_of(tensors.items()), token=token)
    write_json(exchange / _LATEST, latest)
    return latest


def read_latest(exchange: Path) -> Latest | None:
    """Return the newest version; None if none can be read yet."""
    return cast(Latest, read_object(exchange / _LATEST, Latest)) or None


def load_version(exchange: Path, announced: Latest) -> dict[str, torch.Tensor]:
    """Return the tensors of a version. Raise StateError if they are not those announced."""
    folder = version_dir(exchange, announced["version"], announced["token"])
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{folder} cannot be read: {error}") from None
    if (digest := digest_of(tensors.items())) != announced["digest"]:
        raise StateError(f"{folder} holds {digest[:12]}, and {announced['digest'][:12]} was announced")
    return tensors


def prune(exchange: Path, newest: Latest, kept_behind: int) -> None:
    """Remove unfinished versions, and those more than `kept_behind` behind the newest: a worker that has
    loaded one needs its file no longer."""
    for folder in exchange.glob("v-*"):
        version = int(folder.name.split("-")[1])
        if version < newest["version"] - kept_behind:
            shutil.rmtree(folder, ignore_errors=True)
    for unfinished in exchange.glob(".v-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def version_dir(exchange: Path, version: int, token: str) -> Path:
    return exchange / f"v-{version:06d}-{check_name(token, 'token')}"


def digest_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the digest of a network's tensors, in whatever order."""
    described = []
    for name, value in weights:
        raw: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        described.append((name, str(value.dtype), list(value.shape), google_crc32c.value(raw.tobytes())))
    return hashlib.sha256(json.dumps(sorted(described)).encode()).hexdigest()
