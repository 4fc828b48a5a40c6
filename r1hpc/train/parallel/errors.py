"""Define how a training attempt can fail by itself; attempt/rank.py records the cause.

After a TrainError no further attempt is made; the others count as crashes, after which the run may start
again.
"""

from r1hpc.base.errors import FinalError, R1hpcError


class TrainError(FinalError):
    """Training cannot go on as it is configured."""


class NonFiniteError(TrainError):
    """Loss or gradients are not finite, or exploded."""


class ResumeError(TrainError):
    """A checkpoint exists but does not belong to this configuration, or cannot be loaded."""


class ConversionError(R1hpcError):
    """A checkpoint could not be converted on this machine: no room, no memory, killed."""


class SaveError(R1hpcError):
    """A checkpoint could not be written; the previous ones are untouched."""
