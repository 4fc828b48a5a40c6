"""Parse Slurm's time and memory notations; format sizes, times and GPU-hours.

>>> parse_time("1-12:00:00")
129600
>>> format_time(5400)
'01:30:00'
>>> format_bytes(3 * 2**30)
'3.0 GiB'
"""

import math
import re
from collections.abc import Mapping

from r1hpc.base.errors import UsageError

GIB = 2**30
_MEMORY_UNITS = {"K": 1 / 2**20, "M": 1 / 2**10, "G": 1.0, "T": 2.0**10}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_LONGEST_DAYS = 49_711
"""Slurm counts the minutes of a limit, and the seconds of some, in 32 bits."""


def parse_time(text: str) -> int:
    """Return the seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S (sbatch(1), --time)."""
    found = _TIME.fullmatch(text.strip())
    if not found:
        raise UsageError(f"time {text!r} is not one of M, M:S, H:M:S, D-H, D-H:M, D-H:M:S")
    days, a, b, c = (None if part is None else int(part[:12]) for part in found.groups())
    assert a is not None, "the pattern requires one number"
    if days is not None:
        seconds = ((days * 24 + a) * 60 + (b or 0)) * 60 + (c or 0)
    elif c is not None:
        seconds = (a * 60 + (b or 0)) * 60 + c
    else:
        seconds = a * 60 + (b or 0)
    if seconds > _LONGEST_DAYS * 86400:
        raise UsageError(
            f"time {text[:20]!r} is over {_LONGEST_DAYS:,} days: give a limit such as 1-12:00:00"
        )
    return seconds


def limit_s(text: str | None) -> int | None:
    """Parse a time printed by Slurm; None for UNLIMITED, NONE and the like, or an empty text."""
    return parse_time(text) if text and re.fullmatch(r"[\d:-]+", text) else None


def format_time(seconds: float) -> str:
    """Format a time as Slurm does: [D-]HH:MM:SS."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{h:02d}:{m:02d}:{s:02d}"


def format_counts(counts: Mapping[str, int]) -> str:
    """Format named counts, the largest first: 12 empty, 3 language."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in ordered)


def format_duration(seconds: float) -> str:
    """Format a duration for a person: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min, 3 d 04 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def parse_memory_gib(text: str) -> float:
    """Return Slurm's --mem in GiB: 64G, 500000 (MiB), 1T. Raise ValueError for any other text."""
    unit = text[-1:].upper()
    number = text[:-1] if unit in _MEMORY_UNITS else text
    return float(number) * _MEMORY_UNITS.get(unit, _MEMORY_UNITS["M"])


def format_parameters(count: int) -> str:
    """Format a count: 494032768 -> `494 M parameters`; 7615616512 -> `7.62 B parameters`."""
    if count < 1e6:
        return f"{count:,} parameters"
    size, unit = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return f"{count / size:.3g} {unit} parameters"


def format_bytes(count: float) -> str:
    """Format bytes in binary units: 512 B, 1.5 KiB, 3.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def gpu_hours(num_gpus: int, seconds: float) -> float:
    """Return GPUs x allocated wall hours, busy or idle."""
    return num_gpus * seconds / 3600


def format_hours(hours: float) -> str:
    """Format GPU-hours for a person, at least two digits, never a power of ten.

    >>> [format_hours(hours) for hours in (12345, 123.4, 12.34, 0.0123, 7e-5)]
    ['12,345', '123.4', '12.34', '0.012', '0.00007']
    """
    if hours == 0:
        return "0"
    if abs(hours) >= 1000:
        return f"{hours:,.0f}"
    if abs(hours) >= 100:
        return f"{hours:.1f}"
    if abs(hours) >= 0.1:
        return f"{hours:.2f}"
    if abs(hours) >= 0.01:
        return f"{hours:.3f}"
    digits = 1 - math.floor(math.log10(abs(hours)))
    return f"{hours:.{digits}f}".rstrip("0")


def amount(value: float) -> str:
    """Format a number with three digits, thousands with commas.

    >>> amount(184320), amount(2.345), amount(0.01234)
    ('184,000', '2.35', '0.0123')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"
