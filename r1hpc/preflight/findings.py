"""Define the result of one check: its state, what was seen, and the fix."""

from dataclasses import dataclass
from enum import StrEnum


class CheckState(StrEnum):
    """Outcome of a check. unknown: it could not be checked, which is no fault."""

    ok = "ok"
    warn = "warn"
    fail = "fail"
    unknown = "unknown"


@dataclass(frozen=True)
class SiteFinding:
    """Result of one check; `fix` is empty if nothing needs fixing."""

    check: str
    state: CheckState
    detail: str
    fix: str = ""


def ok(check: str, detail: str) -> SiteFinding:
    return SiteFinding(check, CheckState.ok, detail)


def warn(check: str, detail: str, fix: str) -> SiteFinding:
    return SiteFinding(check, CheckState.warn, detail, fix)


def fail(check: str, detail: str, fix: str) -> SiteFinding:
    return SiteFinding(check, CheckState.fail, detail, fix)


def unknown(check: str, detail: str, fix: str = "") -> SiteFinding:
    return SiteFinding(check, CheckState.unknown, detail, fix)
