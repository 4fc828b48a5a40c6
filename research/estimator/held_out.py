"""Predict the families that no fit sees, and print the errors by class.

    python -m research.estimator.held_out

The rows are in published/held_out.csv. Nothing else reads that file.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.plan.hours.estimate import six_nd
from r1hpc.plan.hours.mfu import Coefficients, class_of, coefficients, mfu_belief
from r1hpc.plan.hours.spread import Z90
from research.estimator.published_rows import Published, read_held_out

HEADS = (
    *("class", "n", "families", "stack given", "inside", "not given", "inside", "6ND at 40%"),
    "best constant",
)


@dataclass(frozen=True)
class Prediction:
    """A set-aside row, predicted. `error` is ln(predicted / actual hours), `is_inside` of P10 to P90."""

    row: Published
    error: float
    is_inside: bool


def predictions(known: Coefficients | None = None, is_stack_given: bool = True) -> list[Prediction]:
    """Return every set-aside row with its error.

    Args:
        known: coefficients to use instead of the packaged ones.
        is_stack_given: False predicts as without --stack.
    """
    found = []
    for row in read_held_out():
        work = row.workload if is_stack_given else replace(row.workload, stack=None)
        belief = mfu_belief(work, 0.0, known or coefficients())
        error = math.log(row.measured_mfu) - belief.log_mean
        found.append(Prediction(row, error, abs(error) <= Z90 * belief.log_sd))
    return found


def mean_error(errors: Sequence[float]) -> float:
    """Return the mean of |ln(predicted / actual)|."""
    return statistics.fmean(abs(error) for error in errors)


def held_out_lines(known: Coefficients | None = None) -> list[tuple[str, ...]]:
    """Return the table's lines, one for each class and one for all rows."""
    given, unknown = predictions(known), predictions(known, is_stack_given=False)
    constant = {p.row.id: _constant_error(p.row, 0.4) for p in given}
    middle = statistics.median(constant.values())
    names = sorted({class_of(p.row.workload) for p in given})
    lines: list[tuple[str, ...]] = []
    for name in (*names, "all"):
        of_class = _in_class(name)
        errors = [constant[p.row.id] for p in given if of_class(p)]
        lines.append(
            (
                name,
                str(len(errors)),
                str(len({p.row.family for p in given if of_class(p)})),
                *_figures([p for p in given if of_class(p)]),
                *_figures([p for p in unknown if of_class(p)]),
                f"{mean_error(errors):.3f}",
                f"{mean_error([error - middle for error in errors]):.3f}",
            )
        )
    return lines


def _in_class(name: str) -> Callable[[Prediction], bool]:
    return lambda found: name in ("all", class_of(found.row.workload))


def _figures(found: Sequence[Prediction]) -> tuple[str, str]:
    inside = statistics.fmean(prediction.is_inside for prediction in found)
    return f"{mean_error([prediction.error for prediction in found]):.3f}", f"{inside:.0%}"


def _constant_error(row: Published, mfu: float) -> float:
    return math.log(six_nd(row.workload, mfu) / row.workload.gpu_hours_at(row.measured_mfu))


def main(argv: Sequence[str] | None = None) -> int:
    ArgumentParser(prog="python -m research.estimator.held_out", description=__doc__).parse_args(argv)
    for line in (HEADS, *held_out_lines()):
        cells = (f"{cell:>{len(head)}}" for cell, head in zip(line[1:], HEADS[1:], strict=True))
        print(f"{line[0]:43}", *cells, sep="  ")
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
