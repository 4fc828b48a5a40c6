"""What a diagnosis consists of: findings, each a sentence with its figures and what to try."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How much it matters."""

    error = "error"
    """The run gets nowhere, or its numbers are in doubt."""
    warning = "warning"
    """Hours are being lost, or the training goes wrong."""
    info = "info"
    """It could cost less."""


@dataclass(frozen=True)
class Finding:
    """One thing that stands out."""

    code: str
    """A name for scripts, such as input_bound; it does not change."""
    severity: Severity
    sentence: str
    """One sentence with the figures it rests on."""
    advice: str
    """What to try."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """The figures, unrounded."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
