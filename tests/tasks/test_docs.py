"""The worked examples of docs/tasks.md do what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1hpc.config import load
from r1hpc.config.schema.rl import RewardConfig, TaskConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.text.format import compose

_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text()
_SETTINGS = re.findall(r"\n\n((?:    .*\n)+)", re.sub(r"```.*?```", "", _PAGE, flags=re.DOTALL))
_FILES = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", _PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the page, in the folder where the user stands."""
    for text, name in _FILES:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _example(section: str, key: str) -> Any:
    """The value of a key in the example that has it."""
    (value,) = [
        content[section][key] for content in map(yaml.safe_load, _SETTINGS) if key in content.get(section, {})
    ]
    return value


def test_the_page_has_what_is_tried_here() -> None:
    assert [name for _, name in _FILES] == ["my_task.py", "rewards.py"]
    assert len(_SETTINGS) == 4


@pytest.mark.parametrize("text", _SETTINGS)
def test_every_setting_of_the_page_is_one(text: str, folder: Path) -> None:
    (folder / "job.yaml").write_text(text.replace("\n    ", "\n")[4:])
    load.load(folder / "job.yaml")


def test_the_task_and_the_reward() -> None:
    task = make_task(TaskConfig("my_task.py:Doubling", options={"largest": 50}))
    item = task.item(0)
    number = int(item.prompt.removeprefix("2*").removesuffix("="))
    assert number <= 50
    assert item.answer == str(2 * number)
    right = compose("", item.answer)
    config = RewardConfig(terms=_example("reward", "terms"))
    with Scorer(config, task, max_completion_length=64) as scorer:
        ((score,),) = scorer.score_groups([(item, [Completion(right, 9, False)])])
    assert score.terms == {"accuracy": 1.0, "brevity": pytest.approx(1 - len(right) / 40)}


def test_the_mixture() -> None:
    task = make_task(TaskConfig(mix=_example("task", "mix")))
    labels = [task.item(index).task for index in range(30)]
    assert (labels.count("sums"), labels.count("doubling")) == (20, 10)
