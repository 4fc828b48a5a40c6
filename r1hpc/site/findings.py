"""One thing that was looked at: how it is, what was seen, and what mends it.

Finding("munge", State.fail, "munged does not answer", "ask the administrators to start munged")
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check came out. unknown: it could not be looked at, which is no fault."""

    ok = "ok"
    warn = "warn"
    fail = "fail"
    unknown = "unknown"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `fix` is empty where there is nothing to mend."""

    check: str
    state: State
    detail: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, detail: str) -> Finding:
    return Finding(check, State.ok, detail)


def warn(check: str, detail: str, fix: str) -> Finding:
    return Finding(check, State.warn, detail, fix)


def fail(check: str, detail: str, fix: str) -> Finding:
    return Finding(check, State.fail, detail, fix)


def unknown(check: str, detail: str, fix: str = "") -> Finding:
    return Finding(check, State.unknown, detail, fix)


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed; warnings and unknowns do not count."""
    return all(finding.state is not State.fail for finding in findings)
