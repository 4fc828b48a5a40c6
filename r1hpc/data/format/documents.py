"""Map a token to its document, file, source and licence, and a document to its prompt and completion.

seg_offsets (uint64, num_segments + 1, into the part's tokens) and seg_role (uint8) divide every document of a
part into segments of one role: today a prompt and a completion. Higher numbers are free for further roles; a
reader that does not know them refuses.
"""

import json
from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.data.format.errors import DataError, ShardCorruptError
from r1hpc.data.format.manifest import (
    INPUTS,
    PARTS,
    SEGMENT_OFFSETS,
    SEGMENT_ROLES,
    DatasetManifest,
    DatasetPart,
)
from r1hpc.data.format.zarr_shard import ShardFile, parse_layout

_PER_DOCUMENT = 2


@dataclass(frozen=True)
class DocumentInfo:
    """A document's origin and its place in the dataset."""

    number: int
    source: str
    license: str
    path: str
    """Relative to the source's root."""
    position: int
    """Byte of the line (jsonl), row (parquet, hdf5), id (one-row hdf5) or 0 (text)."""
    token_start: int
    token_stop: int
    """Exclusive; the last token is the EOS id."""
    xxh3_128: str
    """Hash of the document's source bytes, hexadecimal."""


class DocumentTable:
    """The per-document arrays of all parts, read and verified part by part at first use."""

    def __init__(self, manifest: DatasetManifest) -> None:
        self._manifest = manifest
        self._first_token = list(accumulate((part.num_tokens for part in manifest.parts), initial=0))
        self._first_document = list(accumulate((part.num_documents for part in manifest.parts), initial=0))
        self._part: tuple[int, dict[str, Any]] = (-1, {})

    def of_token(self, index: int) -> DocumentInfo:
        """Return the document of token `index`, which must exist."""
        part = bisect_right(self._first_token, index) - 1
        offsets = self._load(part)["doc_offsets"]
        row = int(np.searchsorted(offsets, index - self._first_token[part], side="right")) - 1
        return self._info(part, row)

    def __getitem__(self, number: int) -> DocumentInfo:
        """Return the document `number`, counted over all parts."""
        return self._info(*self.place(number))

    def place(self, number: int) -> tuple[int, int]:
        """Return the part of document `number`, and its number there."""
        if not 0 <= number < self._first_document[-1]:
            raise IndexError(f"document {number} is outside [0, {self._first_document[-1]})")
        part = bisect_right(self._first_document, number) - 1
        return part, number - self._first_document[part]

    def _info(self, part: int, row: int) -> DocumentInfo:
        table = self._load(part)
        source = self._manifest.content["sources"][int(table["doc_source"][row])]
        high, low = (int(value) for value in table["doc_hash"][row])
        start, stop = (int(value) for value in table["doc_offsets"][row : row + 2])
        return DocumentInfo(
            number=self._first_document[part] + row,
            source=source["name"],
            license=source["license"],
            path=table["inputs"][int(table["doc_input"][row])]["path"],
            position=int(table["doc_position"][row]),
            token_start=self._first_token[part] + start,
            token_stop=self._first_token[part] + stop,
            xxh3_128=f"{high:016x}{low:016x}",
        )

    def _load(self, part: int) -> dict[str, Any]:
        """Return the arrays of one part by name; the last part used is cached."""
        number, table = self._part
        if number != part:
            folder = f"{PARTS}/{self._manifest.parts[part].name}"
            names = ("doc_offsets", "doc_source", "doc_hash", "doc_input", "doc_position")
            table = {name: read_array(self._manifest, f"{folder}/{name}") for name in names}
            table["inputs"] = json.loads(self._manifest.read_file(f"{folder}/{INPUTS}"))
            self._part = (part, table)
        return table


def read_array(manifest: DatasetManifest, name: str) -> npt.NDArray[Any]:
    """Return a small array, verified by sha256 and crc32c; ShardCorruptError names the file."""
    layout = parse_layout(manifest.path / name, manifest.read_file(f"{name}/zarr.json"))
    chunks = [np.empty(0, dtype=layout.dtype)]
    for number in range(layout.num_shards):
        path = layout.shard_path(number).relative_to(manifest.path).as_posix()
        manifest.read_file(path)
        shard = ShardFile(layout, number, manifest.file_entry(path)["size"])
        chunks.extend(shard.read_chunk(chunk) for chunk in range(layout.chunks_per_shard))
    values = np.concatenate(chunks)[: layout.num_rows * layout.row_items]
    return values if layout.key_suffix == "" else values.reshape(-1, layout.row_items)


class Role(IntEnum):
    """A segment's role, as stored in seg_role."""

    prompt = 0
    """Given; never a target."""
    completion = 1
    """Learnt, the EOS id that closes it included."""


def has_roles(manifest: DatasetManifest) -> bool:
    return "roles" in manifest.content


def segment_arrays(
    document_offsets: npt.ArrayLike, prompt_lengths: npt.ArrayLike
) -> dict[str, npt.NDArray[Any]]:
    """Return seg_offsets and seg_role of a part, from its doc_offsets and its prompts' token counts."""
    documents = np.asarray(document_offsets, dtype="<u8")
    prompts = np.asarray(prompt_lengths, dtype="<u8")
    offsets = np.empty(_PER_DOCUMENT * len(prompts) + 1, dtype="<u8")
    offsets[::2] = documents
    offsets[1::2] = documents[:-1] + prompts
    roles = np.tile(np.array([Role.prompt, Role.completion], dtype="u1"), len(prompts))
    return {SEGMENT_OFFSETS: offsets, SEGMENT_ROLES: roles}


def read_lengths(
    manifest: DatasetManifest, part: DatasetPart
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the tokens of each document of a part, and of its prompt, verified and checked.

    Raise ShardCorruptError for a part that is damaged or contradicts itself; DataError for unknown roles.
    """
    folder = f"{PARTS}/{part.name}"
    documents = read_array(manifest, f"{folder}/doc_offsets").astype(np.int64)
    offsets = read_array(manifest, f"{folder}/{SEGMENT_OFFSETS}").astype(np.int64)
    roles = read_array(manifest, f"{folder}/{SEGMENT_ROLES}")
    where = manifest.path / folder
    unknown = sorted(set(np.unique(roles).tolist()) - set(Role))
    if unknown:
        raise DataError(f"{where}/{SEGMENT_ROLES} holds roles {unknown}, which this version does not know")
    expected = np.tile([Role.prompt, Role.completion], part.num_documents)
    fits = (
        len(documents) == part.num_documents + 1
        and len(offsets) == _PER_DOCUMENT * part.num_documents + 1
        and np.array_equal(roles, expected)
        and np.array_equal(offsets[::2], documents)
        and (documents[0], documents[-1]) == (0, part.num_tokens)
        and bool((np.diff(offsets) > 0).all())
    )
    if not fits:
        raise ShardCorruptError(
            f"{where}: {SEGMENT_OFFSETS} and {SEGMENT_ROLES} do not divide each document of doc_offsets into "
            "a prompt and a completion; rebuild the dataset"
        )
    return np.diff(documents), offsets[1::2] - offsets[:-1:2]
