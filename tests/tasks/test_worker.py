"""What the verifier's process says of a judge that fails."""

from collections.abc import Mapping
from typing import Any

import pytest

from r1hpc.tasks.grading.arithmetic import RefusedError
from r1hpc.tasks.grading.worker import verdict
from r1hpc.tasks.sandbox import guard

_QUESTION = ("text", "answer", {"a": 1})


@pytest.mark.parametrize(
    "error", [RefusedError("no"), ValueError(), RecursionError(), KeyError("x"), SyntaxError()]
)
def test_a_judge_that_raises_has_refused(error: Exception) -> None:
    assert verdict(_raising(error), _QUESTION) is None
    assert not guard.is_armed()


def test_memory_that_runs_out_ends_the_process() -> None:
    with pytest.raises(MemoryError):
        verdict(_raising(MemoryError()), _QUESTION)


def test_a_judge_works_behind_the_guard() -> None:
    def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
        return guard.is_armed() and (text, answer, metadata) == _QUESTION

    assert verdict(judge, _QUESTION) is True


def _raising(error: BaseException) -> Any:
    def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
        raise error

    return judge
