"""Define the findings of a diagnosis: each a sentence with its figures and advice."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """Severity of a finding."""

    error = "error"
    """The run makes no progress, or its numbers are in doubt."""
    warning = "warning"
    """Hours are being lost, or the training goes wrong."""
    info = "info"
    """It could cost less."""


@dataclass(frozen=True)
class Finding:
    """One finding."""

    code: str
    """A stable name for scripts, such as input_bound."""
    severity: Severity
    sentence: str
    advice: str


def error(code: str, sentence: str, advice: str) -> Finding:
    return Finding(code, Severity.error, sentence, advice)


def warning(code: str, sentence: str, advice: str) -> Finding:
    return Finding(code, Severity.warning, sentence, advice)
