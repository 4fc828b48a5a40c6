"""Define the errors that a user sees as a message. Each says what is wrong and what to do.

base/cli.py prints an R1hpcError's message on stderr and exits with its `exit_status`. It also prints OSError,
a missing package and a loop of links as messages; any other exception is a bug and keeps its traceback.
"""


class R1hpcError(Exception):
    """The command failed. `exit_status` is its exit status."""

    exit_status = 1


class UsageError(R1hpcError, ValueError):
    """Wrong usage: a bad flag, a bad value, an impossible combination."""

    exit_status = 2


class ConfigError(UsageError):
    """A configuration file or override cannot be used."""


class FinalError(R1hpcError):
    """The run cannot continue with its configuration: another start would end the same way."""


class StateError(R1hpcError):
    """A run's file cannot be trusted: torn, foreign, or from another program."""
