"""A budget file, and requests of runs to hold against a budget."""

from pathlib import Path
from typing import Any

from r1hpc.accounting.budget import RunRequest
from r1hpc.plan.hours.spread import Spread

NOW = 1_795_600_000.0


def budget_file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "budget.yaml"
    path.write_text(text)
    return path


def run_of(p50: float | None, p90: float | None = None, **known: Any) -> RunRequest:
    """One run by its P50 and P90."""
    return RunRequest(None if p50 is None else Spread(p50, p50, p90 or p50), **known)
