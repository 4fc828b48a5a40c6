"""A dataset of traces, document by document: prompt, completion and where one ends.

    traces = open_traces(Path("data/cold-start"))
    tokens, num_prompt_tokens = traces.read_document(17)

Tokens are read and verified as reader says; all of a small dataset at its first document, then from memory.
Lengths and roles of all documents are read, verified and checked against one another when the dataset is
opened: 24 bytes of memory a document.
"""

from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.data.errors import DataError
from r1hpc.data.manifest import DatasetManifest
from r1hpc.data.reader import TokenDataset, open_dataset
from r1hpc.data.segments import has_roles, read_lengths

KEPT_BYTES = 16 * 2**20
"""Tokens of a dataset up to this size stay in memory, unless every read is to verify."""
_AT_ONCE = 2**22
"""Tokens that are read together where all of them are."""


def open_traces(path: Path | str, expected_id: str | None = None, *, verify: str = "once") -> "TraceDataset":
    """Open a dataset of traces; arguments and errors as open_dataset.

    Raises:
        DataError: its documents have no roles.
        ShardCorruptError: the roles or offsets are damaged, or do not fit one another.
    """
    tokens = open_dataset(path, expected_id, verify=verify)
    return TraceDataset(tokens, *_all_lengths(tokens.manifest))


class TraceDataset:
    """Documents of prompt and completion, source after source. Made by open_traces.

    Pickled as TokenDataset is: a copy has the lengths, and reads no file before it is asked for a document.
    """

    def __init__(
        self,
        tokens: TokenDataset,
        document_lengths: npt.NDArray[np.int64],
        prompt_lengths: npt.NDArray[np.int64],
    ) -> None:
        """`document_lengths` counts the tokens of each document, `prompt_lengths` those of its prompt."""
        self.tokens, self.manifest = tokens, tokens.manifest
        self.path, self.id = tokens.path, tokens.id
        self.num_documents, self.num_tokens = tokens.num_documents, tokens.num_tokens
        self.vocab_size, self.eos_id = tokens.vocab_size, tokens.eos_id
        self.source_documents: tuple[int, ...] = tuple(
            source["num_documents"] for source in tokens.manifest.content["sources"]
        )
        self.document_lengths, self.prompt_lengths = document_lengths, prompt_lengths
        document_lengths.flags.writeable = prompt_lengths.flags.writeable = False
        self._starts = np.concatenate([[0], np.cumsum(self.document_lengths)])
        self._keeps = tokens.verify == "once" and tokens.num_tokens * tokens.dtype.itemsize <= KEPT_BYTES

    def __repr__(self) -> str:
        return f"TraceDataset({str(self.path)!r}, id={self.id[:12]}, num_documents={self.num_documents})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TraceDataset, (self.tokens, self.document_lengths, self.prompt_lengths)

    def read_document(self, number: int) -> tuple[npt.NDArray[np.uint32], int]:
        """The tokens of a document, EOS id included, and how many of them are the prompt.

        Raises:
            IndexError: no such document.
            ShardCorruptError: names the file and chunk that cannot be trusted.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} is outside [0, {self.num_documents})")
        start, length = int(self._starts[number]), int(self.document_lengths[number])
        tokens = self._kept[start : start + length] if self._keeps else self.tokens.read(start, length)
        return tokens.astype(np.uint32), int(self.prompt_lengths[number])

    def prompt_keys(self) -> npt.NDArray[np.uint64]:
        """A number for each document, equal where the prompts are; all tokens are read for it.

        Raises:
            ShardCorruptError: names the file and chunk that cannot be trusted.
        """
        found = np.empty(self.num_documents, np.uint64)
        begin = 0
        while begin < self.num_documents:
            start = int(self._starts[begin])
            end = max(begin + 1, int(np.searchsorted(self._starts, start + _AT_ONCE, side="right")) - 1)
            block = self.tokens.read(start, int(self._starts[end]) - start)
            for number in range(begin, end):
                first = int(self._starts[number]) - start
                prompt = block[first : first + int(self.prompt_lengths[number])].tobytes()
                found[number] = int.from_bytes(blake2b(prompt, digest_size=8).digest(), "little")
            begin = end
        return found

    @cached_property
    def _kept(self) -> npt.NDArray[Any]:
        """All tokens, verified."""
        return self.tokens.read(0, self.num_tokens)


def _all_lengths(manifest: DatasetManifest) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens of each document, and of each prompt, over all parts."""
    if not has_roles(manifest):
        raise DataError(
            f"{manifest.path} holds documents without roles: traces come from a recipe whose sources have "
            "kind: traces, or from data.traces"
        )
    found = [read_lengths(manifest, part) for part in manifest.parts]
    documents, prompts = (np.concatenate(column) for column in zip(*found, strict=True))
    return documents, prompts
