"""Roles: which tokens of a document are the prompt, and which the completion that is learnt.

The arrays seg_offsets (uint64, num_segments + 1, into the part's tokens) and seg_role (uint8) divide every
document of a part into segments of one role. Documents are made of two today, a prompt and a completion;
the numbers above are free for further roles, which a reader that does not know them refuses.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.data.documents import read_array
from r1hpc.data.errors import DataError, ShardCorruptError
from r1hpc.data.layout import PARTS, SEGMENT_OFFSETS, SEGMENT_ROLES
from r1hpc.data.manifest import DatasetManifest, DatasetPart

_PER_DOCUMENT = 2


class Role(IntEnum):
    """What a segment is, as stored in seg_role."""

    prompt = 0
    """Given; never a target."""
    completion = 1
    """Learnt, the EOS id that closes it included."""


def has_roles(manifest: DatasetManifest) -> bool:
    """Whether the documents of this dataset carry roles."""
    return "roles" in manifest.content


def segment_arrays(
    document_offsets: npt.ArrayLike, prompt_lengths: npt.ArrayLike
) -> dict[str, npt.NDArray[Any]]:
    """seg_offsets and seg_role of a part, from its doc_offsets and the tokens of each document's prompt."""
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
    """Tokens of each document of a part, and of each one's prompt, verified and checked.

    Raises:
        ShardCorruptError: damaged, or the arrays of the part contradict one another; names the part.
        DataError: roles this version does not know.
    """
    folder = f"{PARTS}/{part.name}"
    documents = read_array(manifest, f"{folder}/doc_offsets").astype(np.int64)
    offsets = read_array(manifest, f"{folder}/{SEGMENT_OFFSETS}").astype(np.int64)
    roles = read_array(manifest, f"{folder}/{SEGMENT_ROLES}")
    where = manifest.path / folder
    unknown = sorted(set(np.unique(roles).tolist()) - set(Role))
    if unknown:
        raise DataError(f"{where}/{SEGMENT_ROLES} holds roles {unknown}, which this version does not know")
    _check(where, part, documents, offsets, roles)
    return np.diff(documents), offsets[1::2] - offsets[:-1:2]


def _check(where: Any, part: DatasetPart, documents: Any, offsets: Any, roles: Any) -> None:
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
