"""From a token back to the document, file, source and licence it came from."""

import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.data.layout import INPUTS, PARTS
from r1hpc.data.manifest import DatasetManifest
from r1hpc.data.shardfile import ShardFile, parse_layout


@dataclass(frozen=True)
class DocumentInfo:
    """Where one document came from and where it lies."""

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
    """The per-document arrays of all parts, read and verified part by part when first asked for."""

    def __init__(self, manifest: DatasetManifest) -> None:
        self._manifest = manifest
        self._first_token = list(accumulate((part.num_tokens for part in manifest.parts), initial=0))
        self._first_document = list(accumulate((part.num_documents for part in manifest.parts), initial=0))
        self._part: tuple[int, dict[str, Any]] = (-1, {})

    def of_token(self, index: int) -> DocumentInfo:
        """The document of token `index`, which must exist."""
        part = bisect_right(self._first_token, index) - 1
        offsets = self._load(part)["doc_offsets"]
        row = int(np.searchsorted(offsets, index - self._first_token[part], side="right")) - 1
        return self._info(part, row)

    def __getitem__(self, number: int) -> DocumentInfo:
        """The document `number`, counted over all parts."""
        return self._info(*self.place(number))

    def place(self, number: int) -> tuple[int, int]:
        """The part of document `number`, and its number there."""
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
        """The arrays of one part by name; the last part used is kept."""
        number, table = self._part
        if number != part:
            folder = f"{PARTS}/{self._manifest.parts[part].name}"
            names = ("doc_offsets", "doc_source", "doc_hash", "doc_input", "doc_position")
            table = {name: read_array(self._manifest, f"{folder}/{name}") for name in names}
            table["inputs"] = json.loads(self._manifest.read_file(f"{folder}/{INPUTS}"))
            self._part = (part, table)
        return table


def read_array(manifest: DatasetManifest, name: str) -> npt.NDArray[Any]:
    """A whole small array, its files verified by sha256 and its chunks by crc32c.

    Raises:
        ShardCorruptError: names the file.
    """
    layout = parse_layout(manifest.path / name, manifest.read_file(f"{name}/zarr.json"))
    chunks = [np.empty(0, dtype=layout.dtype)]
    for number in range(layout.num_shards):
        path = layout.shard_path(number).relative_to(manifest.path).as_posix()
        manifest.read_file(path)
        shard = ShardFile(layout, number, manifest.file_entry(path)["size"])
        chunks.extend(shard.read_chunk(chunk) for chunk in range(layout.chunks_per_shard))
    values = np.concatenate(chunks)[: layout.num_rows * layout.row_items]
    return values if layout.key_suffix == "" else values.reshape(-1, layout.row_items)
