"""Draw the points of a random search.

    grids, words = draw({"lr": ["log:1e-5..1e-3"], "seed": ["0", "1"]}, Samples(20))
    grids[0]          # {"lr": ["0.000655"], "seed": ["0", "1"]}

A value depends only on the seed of the samples, the setting and the number of the draw. So the same call
draws the same points, and a longer list begins with the shorter one.
"""

import hashlib
import math
import re
from typing import NamedTuple

from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.sweeps.definition import MOST_POINTS, NOT_SO_MANY, NUMBER, Grid, is_range, read_values

_WHOLE = re.compile(r"-?\d{1,9}")
_EXAMPLES = {"log": "1e-5..1e-3", "uniform": "0.0..0.3", "int": "1..8", "log-int": "16..1024"}


class Samples(NamedTuple):
    """The number of samples, and the seed of their draws."""

    num_samples: int
    seed: int = 0


class Range(NamedTuple):
    """The values that a setting is drawn from: numbers from `low` to `high`, or one of the choices."""

    kind: str
    low: float
    high: float
    choices: tuple[str, ...] = ()

    def value(self, share: float) -> str:
        """Return the value below which this share of the draws lies, from 0 up to but not including 1.

        It has four significant digits, more where the range is narrower than that.
        """
        low, high, is_whole = self.low, self.high, self.kind not in ("log", "uniform")
        end = high + 1 if is_whole else high
        if self.kind.startswith("log"):
            value = math.exp(math.log(low) + share * (math.log(end) - math.log(low)))
        else:
            value = low + share * (end - low)
        if is_whole:
            number = int(min(max(math.floor(value), low), high))
            return self.choices[number] if self.choices else str(number)
        size = min(abs(value) or high - low, high - low)
        rounded = round(value, 3 - math.floor(math.log10(size)))
        return repr(min(max(rounded, low), high) + 0.0).removesuffix(".0")


def read_range(key: str, text: str) -> Range:
    """Return the range in a text such as log:1e-5..1e-3. Raise UsageError if it is none."""
    kind, _, rest = text.partition(":")
    if kind == "choice":
        choices = tuple(read_values(f"{key}={rest}"))
        return Range(kind, 0, len(choices) - 1, choices)
    word, ends = printable(f"{key}={text}"), rest.split("..")
    form = _WHOLE if kind.endswith("int") else NUMBER
    if len(ends) != 2 or not all(map(form.fullmatch, ends)):
        what = "whole numbers of up to nine digits" if form is _WHOLE else "numbers"
        raise UsageError(f"{word}: give two {what}, as {kind}:{_EXAMPLES[kind]}")
    low, high = map(float, ends)
    if not low < high or not math.isfinite(high - low):
        raise UsageError(f"{word}: a range goes up, from one finite number to another")
    if kind.startswith("log") and low <= 0:
        raise UsageError(f"{word}: a logarithmic range begins above 0. Use uniform: or int: to include 0")
    return Range(kind, low, high)


def draw(grid: Grid, samples: Samples | None) -> tuple[list[Grid], list[str]]:
    """Return a grid for each sample, with its values drawn, and the words that they are drawn from.

    The samples differ: a draw that repeats an earlier one is left out.
    """
    words = sorted(f"{key}={values[0]}" for key, values in grid.items() if is_range(values[0]))
    ranges = {key: read_range(key, text) for key, _, text in (word.partition("=") for word in words)}
    if samples is None:
        if words:
            raise UsageError(f"{printable(words[0])} is drawn: add the number of samples, --samples 20")
        return [grid], []
    num_samples, seed = samples
    if num_samples < 1:
        raise UsageError(f"--samples {num_samples}: give 1 or more")
    if not ranges:
        raise UsageError(
            f"--samples {num_samples}: no setting has a range. Give one, such as train.lr=log:1e-5..1e-3, or "
            "leave --samples out"
        )
    others = {key: values for key, values in grid.items() if key not in ranges}
    if num_samples * math.prod(map(len, others.values())) > MOST_POINTS:
        raise UsageError(NOT_SO_MANY)
    drawn: dict[tuple[str, ...], Grid] = {}
    most = 20 * num_samples + 1000
    for index in range(most):
        values = {key: each.value(_share(seed, key, index)) for key, each in ranges.items()}
        drawn.setdefault(tuple(values.values()), {**grid, **{key: [text] for key, text in values.items()}})
        if len(drawn) == num_samples:
            return list(drawn.values()), [*words, f"--sample-seed {seed}"]
    raise UsageError(
        f"--samples {num_samples}: {most:,} draws gave {len(drawn)} different samples. Give --samples "
        f"{len(drawn)} or fewer, or wider ranges"
    )


def _share(seed: int, key: str, index: int) -> float:
    digest = hashlib.sha256(f"{seed} {key} {index}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
