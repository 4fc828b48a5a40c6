"""What can be wrong with a dataset. Each message names the file and what to do."""

from r1hpc.base.errors import R1hpcError


class DataError(R1hpcError):
    """A dataset that cannot be used as asked."""


class DatasetMissingError(DataError):
    """There is no dataset in this folder."""


class DatasetMismatchError(DataError):
    """The dataset is a sound one, but not the one that was asked for."""


class ShardCorruptError(DataError):
    """Bytes differ from what the manifest promises: no token of them is returned."""


class ShardMissingError(ShardCorruptError):
    """A file of the manifest is not there."""


class InvalidTokenError(ShardCorruptError):
    """A token id that the vocabulary does not have: a hole, or another tokenizer's data."""
