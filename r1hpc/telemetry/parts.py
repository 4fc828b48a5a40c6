"""When the pieces of work came that lie finished on disk, such as the parts of a stage without steps.

times = finish_times(run.all_parts, attempt.start, attempt.end)     # the oldest first
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


def finish_times(paths: Iterable[Path], start: float, end: float | None = None) -> list[float]:
    """When those were finished that were so from `start` to `end`: each appears whole, so by its mtime."""
    return sorted(t for t in _mtimes(paths) if start <= t and (end is None or t <= end))


def _mtimes(paths: Iterable[Path]) -> Iterator[float]:
    for path in paths:
        with suppress(FileNotFoundError):  # what is done with is removed
            yield path.stat().st_mtime
