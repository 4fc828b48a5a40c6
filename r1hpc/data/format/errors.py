"""What can be wrong with a dataset. Each message names the file and what to do."""

import errno
from pathlib import Path

from r1hpc.base.errors import FinalError, R1hpcError

_LASTING = (None, errno.EACCES, errno.EPERM)
"""None: of a decoder, about what stands in the file."""


class DataError(R1hpcError):
    """A dataset that cannot be used as asked."""


class ClearedError(DataError):
    """Another build cleared what this one wrote: it had finished, or thought that nobody was at work."""


class DatasetMissingError(DataError):
    """There is no dataset in this folder."""


class DatasetMismatchError(DataError, FinalError):
    """The dataset is a sound one, but not the one that was asked for."""


class ShardCorruptError(DataError):
    """Bytes differ from what the manifest promises: no token of them is returned."""


class ShardMissingError(ShardCorruptError):
    """A file of the manifest is not there."""


class InvalidTokenError(ShardCorruptError):
    """A token id that the vocabulary does not have: a hole, or another tokenizer's data."""


def refuse_passing(error: Exception, path: Path) -> None:
    """Raise where reading failed for what may be otherwise next time: a disk, a network, a file that is gone.

    What is wrong with the content of a file is put aside and counted; this must not be, for a finished unit
    is not made again.

    Raises:
        DataError: names the file.
    """
    if isinstance(error, OSError) and error.errno not in _LASTING:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): nothing of it was put aside; build again once it can"
        ) from None


def reason(error: Exception, path: Path) -> str:
    """What it says, without where the file lies: that becomes part of a dataset, and so of its id."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.replace(str(path), path.name)
