"""Draw the points of a random search.

    grids, words = draw({"lr": ["log:1e-5..1e-3"], "seed": ["0", "1"]}, Samples(20))
    grids[0]          # {"lr": ["0.0002512"], "seed": ["0", "1"]}

Each setting has its own random stream, from the seed of the samples and its name. So the same call draws the
same points, and a longer list begins with the shorter one.
"""

import functools
import math
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.sweeps.definition import NUMBER, RANGES, Grid, check_number, is_range, read_values, same_value

_WHOLE = re.compile(r"-?\d{1,9}")


class Samples(NamedTuple):
    """The number of samples, and the seed of their draws."""

    num_samples: int
    seed: int = 0


def draw(grid: Grid, samples: Samples | None) -> tuple[list[Grid], list[str]]:
    """Return a grid for each sample, with its values drawn, and the words that they are drawn from.

    The samples differ: a draw that repeats an earlier one is left out.
    """
    words = sorted(f"{key}={values[0]}" for key, values in grid.items() if is_range(values[0]))
    if samples is None:
        if words:
            raise UsageError(f"{printable(words[0])} is drawn: add the number of samples, --samples 20")
        return [grid], []
    num_samples, seed = samples
    if num_samples < 1:
        raise UsageError(f"--samples {num_samples}: give 1 or more")
    if not words:
        raise UsageError(
            f"--samples {num_samples}: no setting has a range of {', '.join(RANGES)}. Give one, such as "
            "train.lr=log:1e-5..1e-3, or leave --samples out"
        )
    check_number(num_samples * math.prod(map(len, grid.values())))
    value_at = {word.partition("=")[0]: read_range(word) for word in words}
    streams = {key: random.Random(f"{seed} {key}") for key in value_at}
    drawn: dict[tuple[str, ...], Grid] = {}
    num_draws = 20 * num_samples + 1000
    for _ in range(num_draws):
        values = {key: value_at[key](stream.random()) for key, stream in streams.items()}
        sample = tuple(same_value(key, text) for key, text in values.items())
        drawn.setdefault(sample, {**grid, **{key: [text] for key, text in values.items()}})
        if len(drawn) == num_samples:
            return list(drawn.values()), [*words, f"--sample-seed {seed}"]
    raise UsageError(
        f"--samples {num_samples}: {num_draws:,} draws gave {len(drawn)} different samples. Give --samples "
        f"{len(drawn)} or fewer, or wider ranges"
    )


def read_range(word: str) -> Callable[[float], str]:
    """Return a function from uniform draws, from 0 up to but not including 1, to values of KEY=KIND:....

    Raise UsageError if the range is impossible.
    """
    key, _, text = word.partition("=")
    kind, _, limits = text.partition(":")
    if kind == "choice":
        choices = read_values(f"{key}={limits}")
        return lambda share: choices[int(share * len(choices))]
    ends = limits.split("..")
    form = _WHOLE if kind.endswith("int") else NUMBER
    if len(ends) != 2 or "..." in limits or not all(map(form.fullmatch, ends)):
        what = "whole numbers of up to nine digits" if form is _WHOLE else "numbers"
        raise UsageError(f"{printable(word)}: give two {what}, as {kind}:{RANGES[kind]}")
    low, high = map(float, ends)
    if not -1e300 <= low < high <= 1e300:
        raise UsageError(f"{printable(word)}: a range goes up, with numbers of up to 1e300")
    if kind.startswith("log") and low <= 0:
        raise UsageError(f"{printable(word)}: a logarithmic range begins above 0. Use uniform: or int:")
    return functools.partial(_number, kind, low, high)


def _number(kind: str, low: float, high: float, share: float) -> str:
    """Return the number with four significant digits, more where the range is narrower than that."""
    is_whole = kind.endswith("int")
    end = high + is_whole
    if kind.startswith("log"):
        value = math.exp(math.log(low) + share * (math.log(end) - math.log(low)))
    else:
        value = low + share * (end - low)
    if is_whole:
        return str(int(min(max(math.floor(value), low), high)))
    size = min(abs(value) or high - low, high - low)
    rounded = round(value, 3 - math.floor(math.log10(size)))
    return repr(min(max(rounded, low), high) + 0.0).removesuffix(".0")
