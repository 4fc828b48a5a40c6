"""Define the findings of a diagnosis: each a sentence with its figures and advice."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


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
    """One sentence with its figures."""
    advice: str
    """Advice to try."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """The figures, unrounded."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
