"""Define dataset errors. Each message names the file and what to do."""

import errno
from pathlib import Path

from r1hpc.base.errors import FinalError, R1hpcError

_LASTING = (None, errno.EACCES, errno.EPERM)
"""errno values that will not pass. None: a decoder's error about the file's content."""


class DataError(R1hpcError):
    """A dataset that cannot be used."""


class ClearedError(DataError):
    """Another build cleared this one's files: it had finished, or believed no other was running."""


class DatasetMissingError(DataError):
    """There is no dataset in this folder."""


class DatasetMismatchError(DataError, FinalError):
    """A sound dataset, but not the one that was wanted."""


class ShardCorruptError(DataError):
    """Bytes differ from what the manifest promises: no token of them is returned."""


class ShardMissingError(ShardCorruptError):
    """A file of the manifest is not there."""


class InvalidTokenError(ShardCorruptError):
    """A token id outside the vocabulary: a hole, or another tokenizer's data."""


def refuse_passing(error: Exception, path: Path) -> None:
    """Raise DataError if a read failed for a reason that may pass: a disk, a network, a missing file.

    Faulty content is put aside and counted. These failures must not be: a finished unit is not made again.
    """
    if isinstance(error, OSError) and error.errno not in _LASTING:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): nothing of it was put aside; build again once it can"
        ) from None


def reason(error: Exception, path: Path) -> str:
    """Return the error without the file's folder: it becomes part of a dataset, and so of its id."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.replace(str(path), path.name)
