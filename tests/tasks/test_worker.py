"""What the verifier's process says of a judge that fails."""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest

from r1hpc.tasks.grading.arithmetic import RefusedError
from r1hpc.tasks.grading.verifier import Verifier
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


def test_what_a_library_is_refused_is_told_and_counted() -> None:
    """The library may swallow the error and call the answer wrong."""
    program = """
import json
from r1hpc.tasks.grading import worker
from r1hpc.tasks.sandbox import guard

def judge(text, answer, metadata):
    try:
        return eval(text) == eval(answer)
    except Exception:
        return False

guard.install()
print(json.dumps([worker.verdict(judge, ["1+1", "2", {}]), worker.verdict(lambda *_: True, ["", "", {}])]))
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    refused, right = json.loads(printed)
    assert "was refused what it needs (compile)" in refused["error"]
    assert right is True
    with closing(Verifier("exact", {}, 5.0)) as verifier:
        assert verifier._understood(refused) is False
    assert verifier.stats.failures == 1
    assert verifier.sentences == [refused["error"]]
