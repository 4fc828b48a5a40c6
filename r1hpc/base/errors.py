"""Errors a user can cause. Each message says what was found and what to do about it.

A command turns an R1hpcError into its message on stderr and its `exit_status`; everything else is a
bug and keeps its traceback.
"""


class R1hpcError(Exception):
    """Could not be done. `exit_status` is what the command-line command exits with."""

    exit_status = 1


class UsageError(R1hpcError, ValueError):
    """Asked wrongly: a bad flag, a bad value, an impossible combination."""

    exit_status = 2


class ConfigError(UsageError):
    """A configuration file or override that cannot be used."""


class FinalError(R1hpcError):
    """The run cannot go on as it is configured: starting it again would end the same way."""


class StateError(R1hpcError):
    """A file of a run that cannot be trusted: torn, foreign, or from another program."""
