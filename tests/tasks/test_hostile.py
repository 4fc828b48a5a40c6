"""Hostile completions through every verifier: nothing runs, nothing takes long, nothing stays behind.

The full ten thousand: python -m pytest tests/tasks/test_hostile.py -m soak -s
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from r1hpc.config.schema.rl import RewardConfig, TaskConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Task
from r1hpc.tasks.rewards import TERMS, Completion, Scorer
from r1hpc.tasks.text.format import compose, take_apart
from tests.tasks.conftest import children
from tests.tasks.hostile import hostile

_TIMEOUT_S = 0.5
_SLACK_S = 6.0
"""To kill a process and to be scheduled again, on a machine with more work than cores."""
_GROUP = 50
_FEW = {"chain_sum": 400, "countdown": 400, "jsonl": 60, "reasoning_gym:countdown": 40}
_ALL = (*_FEW, "reasoning_gym:n_queens", "reasoning_gym:simple_integration")


def _task(name: str, folder: Path) -> Task:
    if name != "jsonl":
        return make_task(TaskConfig(name))
    rows = [
        {"question": f"{n}?", "answer": answer} for n, answer in enumerate(("42", "2x", r"\frac{1}{3}") * 9)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return make_task(TaskConfig(name, 0, {"path": str(folder / "pairs.jsonl")}))


def _survives(name: str, count: int, folder: Path) -> str:
    """Score `count` hostile completions; what the verifier met, in words."""
    before, canary, started = children(), folder / "canary", time.monotonic()
    task = _task(name, folder)
    config = RewardConfig(terms=dict.fromkeys(TERMS, 0.1), timeout_s=_TIMEOUT_S)
    num_correct = 0
    with Scorer(config, task, max_completion_length=64) as scorer:
        for index, texts in enumerate(_batches(hostile(11, count, canary))):
            item = task.item(index)
            completions = [Completion(text, len(text), False) for text in texts]
            (scores,) = scorer.score_groups([(item, completions)])
            assert [score.well_formed for score in scores] == [take_apart(text).well_formed for text in texts]
            num_correct += sum(score.correct for score in scores)
        stats = scorer.stats
    del task
    assert not canary.exists(), "a completion was evaluated"
    assert stats.slowest_s < _TIMEOUT_S + _SLACK_S
    assert num_correct < count / 20
    assert children() <= before, "a process is left"
    return f"{name}: {count} in {time.monotonic() - started:.0f} s, {num_correct} right by chance, {stats}"


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _GROUP)):
        yield batch


@pytest.mark.parametrize("name", _FEW)
def test_hostile_completions(name: str, tmp_path: Path) -> None:
    _survives(name, _FEW[name], tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", _ALL)
def test_ten_thousand_hostile_completions(name: str, tmp_path: Path) -> None:
    print(f"\n{_survives(name, 10_000, tmp_path)}")


def test_the_canary_sings(tmp_path: Path) -> None:
    """Scored the package's own way, one of these completions does run: the others prove something."""
    canary = tmp_path / "canary"
    code = (
        "import sys, reasoning_gym; d = reasoning_gym.create_dataset('spiral_matrix', seed=0);"
        "d.score_answer(sys.argv[1], d[0])"
    )
    program = f"[__import__('os').system('touch {canary}')]"
    subprocess.run([sys.executable, "-c", code, program], check=True)
    assert canary.exists()
    assert any(text == compose("", program) for text in hostile(11, 10_000, canary))
