"""The families set aside: no fit reads them, and their errors are those of the page."""

import pytest

from r1hpc.plan.hours.mfu import class_of
from research.estimator.held_out import Prediction, main, mean_error, predictions
from research.estimator.published_rows import read_held_out, read_published

_LIMITS = {
    "Hopper, fp8, dense, megatron": 0.15,
    "Hopper, fp8, dense, torch": 0.27,
    "Hopper, fp8, experts, megatron": 0.25,
    "Blackwell, fp8, dense, megatron": 0.2,
    "Blackwell, fp8, experts, megatron": 0.1,
    "Hopper, 16 bits or more, dense, torch": 0.11,
}
"""Mean of |ln(predicted / actual)|."""


def _of(name: str, found: list[Prediction]) -> list[float]:
    return [each.error for each in found if class_of(each.row.workload) == name]


def test_no_fit_sees_their_families() -> None:
    fitted = read_published()
    for row in read_held_out():
        assert row.family not in {other.family for other in fitted}
        assert row.verified


@pytest.mark.parametrize("name", _LIMITS)
def test_errors_with_the_stack_given(name: str) -> None:
    assert mean_error(_of(name, predictions())) <= _LIMITS[name]


def test_intervals_hold_with_the_stack_and_without() -> None:
    for is_stack_given in (True, False):
        found = predictions(is_stack_given=is_stack_given)
        assert 0.75 <= sum(each.is_inside for each in found) / len(found) <= 0.95


def test_the_stack_halves_the_error_of_fp8() -> None:
    for name in ("Hopper, fp8, dense, megatron", "Blackwell, fp8, dense, megatron"):
        without = _of(name, predictions(is_stack_given=False))
        assert mean_error(_of(name, predictions())) < 0.5 * mean_error(without)


def test_the_command_prints_each_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in _LIMITS)
    assert printed.splitlines()[-1].split()[:3] == ["all", "60", "8"]
