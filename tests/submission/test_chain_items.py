"""Reinforcement learning begins where the stages before it ended, and an evaluation knows what they saw."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import EvaluateConfig, GenerateConfig, TaskConfig
from r1hpc.config.schema.run import DataConfig, RunConfig
from r1hpc.submission.chain.file import (
    Definition,
    connected,
    open_definition,
    override,
    read_definition,
    save_definition,
)
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.order import Order
from r1hpc.submission.resume import reconfigured
from r1hpc.tasks.problems.asked_items import asked_items, repeated
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import check_num_held_out
from tests.recorded import RecordedRun
from tests.submission.chains import write_chain
from tests.tasks.own_code import TASK, write

_R1 = Path(__file__).resolve().parents[2] / "jobs" / "r1.yaml"
_SMALL = """
  - {name: traces, stage: traces, generate: {num_items: 70, first_item: 5}}
  - {name: sft, stage: sft}
  - {name: grpo, stage: rl}
"""


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Definition:
    """The chain that comes with the toolkit."""
    return read_definition(_R1, ChainDir(tmp_path_factory.mktemp("r1") / "c"))


def _first_item(root: Path, *overrides: str) -> int | None:
    chain = read_definition(write_chain(root, _SMALL), ChainDir(root / "c"), overrides)
    return chain.stage("grpo").config.task.first_item


def test_rl_asks_none_of_the_items_that_the_cold_start_showed(r1: Definition, tmp_path: Path) -> None:
    traces = r1.stage("traces").config.generate
    assert r1.stage("grpo").config.task.first_item == traces.first_item + traces.num_items == 60000
    assert r1.stage("sft").config.task.first_item is None
    assert _first_item(tmp_path) == 75
    assert _first_item(tmp_path, "grpo:task.first_item=3") == 3
    assert _first_item(tmp_path, "grpo:task.seed=1") is None, "other questions are nobody's"


def test_a_file_in_another_order_is_not_other_questions(r1: Definition) -> None:
    questions = TaskConfig("file", options={"path": "/data/train.parquet"})
    traces = replace(r1.stage("traces").config, task=questions)
    needs: dict[str, tuple[str, ...]] = {"traces": (), "grpo": ("traces",)}

    def first_item(seed: int = 0, first: int | None = None) -> int | None:
        rl = replace(r1.stage("grpo").config, task=replace(questions, seed=seed, first_item=first))
        return connected({"traces": traces, "grpo": rl}, needs)["grpo"].task.first_item

    assert first_item() == 60000
    assert first_item(seed=1, first=7) == 7
    with pytest.raises(UsageError, match=r"stage grpo: .* in another order, .* Set grpo:task.seed=0"):
        first_item(seed=1)


_AFTER: dict[str, tuple[str, ...]] = {"traces": (), "grpo": ("traces",)}


def _begins(shown: TaskConfig, asked: TaskConfig, num_shown: int = 70) -> RunConfig:
    """Stage rl on one task after `num_shown` demonstrations of another."""
    traces = RunConfig(stage="traces", task=shown, generate=GenerateConfig(num_items=num_shown))
    rl = RunConfig(stage="rl", task=asked)
    return connected({"traces": traces, "grpo": rl}, _AFTER)["grpo"]


def _questions(folder: Path, num: int, name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text(
        "".join(json.dumps({"question": f"{n}+{n}", "answer": str(2 * n)}) + "\n" for n in range(num))
    )
    return str(path)


def test_how_a_question_is_put_and_judged_makes_it_no_other_one(tmp_path: Path) -> None:
    path = _questions(tmp_path, 100)
    (tmp_path / "link.jsonl").symlink_to(path)
    plain = TaskConfig("file", options={"path": path})
    for other in (
        TaskConfig("file", options={"path": path, "template": "Q: {question}", "judge": "exact"}),
        TaskConfig("jsonl", options={"path": path}),
        TaskConfig("file", answer="answer", options={"path": str(tmp_path / "link.jsonl")}),
    ):
        assert _begins(plain, other).task.first_item == 70
        assert _begins(other, plain).task.first_item == 70
    assert _begins(plain, replace(plain, question="problem")).task.first_item is None
    gym = TaskConfig("reasoning_gym:gcd", options={"min_numbers": 2})
    put = replace(gym, options={**gym.options, "template": "Q: {question}"})
    assert _begins(gym, put).task.first_item == 70
    assert _begins(gym, replace(gym, options={"min_numbers": 3})).task.first_item is None
    assert _begins(TaskConfig(), TaskConfig(options={"num_terms": 6})).task.first_item == 70


def _asked(task: TaskConfig, first: int, num: int) -> set[str]:
    """Questions without their template."""
    made = make_task(task)
    return {made.item(index).prompt.rpartition(" ")[2] for index in range(first, first + num)}


@pytest.mark.parametrize("weight", [1, 3])
def test_a_file_in_a_mixture_is_begun_after_what_was_shown_of_it(tmp_path: Path, weight: int) -> None:
    file = {"options": {"path": _questions(tmp_path, 1000), "template": "Q: {question}"}}
    alone = TaskConfig("file", **file)  # type: ignore[arg-type]
    sums = {"name": "chain_sum", "options": {"num_terms": 4}, "weight": 2}
    mixed = TaskConfig(mix={"sums": sums, "own": {"name": "jsonl", "weight": weight, **file}})
    other = replace(mixed, mix=dict(reversed(mixed.mix.items())))
    for shown, asked in ((alone, mixed), (mixed, alone), (mixed, other)):
        first = _begins(shown, asked).task.first_item
        assert first
        seen = {question for question in _asked(shown, 0, 70) if "+" in question}
        new = {question for question in _asked(asked, first, 300) if "+" in question}
        assert len(seen) > 15
        assert len(new) > 90
        assert not seen & new
    assert _begins(mixed, mixed).task.first_item == 70


def test_a_list_of_own_code_in_another_order_is_refused(tmp_path: Path) -> None:
    text = """
        class Words:
            def __len__(self): return 50
            def question(self, index): return f"say {index}", str(index)
    """
    listed, drawn = write(tmp_path, "words.py", text), write(tmp_path, "doubling.py", TASK)
    words = TaskConfig(f"{listed}:Words")
    assert _begins(words, words).task.first_item == 70
    copy = tmp_path / "copy"
    copy.mkdir()
    again = TaskConfig(f"{write(copy, 'words.py', text)}:Words")
    assert _begins(words, again).task.first_item == 70
    with pytest.raises(UsageError, match=r"stage grpo: .* in another order, .* Set grpo:task.seed=0"):
        _begins(words, replace(again, seed=1))
    mixed = TaskConfig(mix={"sums": {"name": "chain_sum"}, "own": {"name": words.name, "seed": 1}})
    with pytest.raises(UsageError, match=r"another order, .* Set grpo:task.mix.own.seed=0"):
        _begins(words, mixed)
    assert _begins(words, replace(again, seed=1, first_item=3)).task.first_item == 3
    doubling = TaskConfig(f"{drawn}:Doubling")
    assert _begins(doubling, replace(doubling, seed=1)).task.first_item is None, "drawn from an endless list"


def test_the_chain_for_gsm8k_asks_no_question_twice_before_it_says_so(tmp_path: Path) -> None:
    """jobs/r1_a100.yaml says of itself that its cold start and GRPO are one pass over GSM8K's 7,473."""
    path = _questions(tmp_path, 7473)
    job = _R1.with_name("r1_a100.yaml")
    chain = read_definition(job, ChainDir(tmp_path / "c"), [f"task.options.path={path}"])
    task = make_task(chain.stage("grpo").config.task)
    for name in ("traces", "grpo", "reject"):
        assert repeated(chain.stage(name).config, task) == []
    traces, grpo = (asked_items(chain.stage(name).config) for name in ("traces", "grpo"))
    assert (traces.stop, grpo.start) == (1600, 1600)
    check_num_held_out(task, chain.stage("evaluate_grpo").config.evaluate.num_items or 0)
    longer = read_definition(
        job, ChainDir(tmp_path / "c"), [f"task.options.path={path}", "grpo:train.num_steps=500"]
    )
    (said,) = repeated(longer.stage("grpo").config, task)
    assert re.search(r"items 1,600 to 17,599, .* 6,\d\d\d different .* on they come again", said)


def test_a_second_rl_stage_goes_on_after_the_first(r1: Definition) -> None:
    first, traces = r1.stage("grpo").config, r1.stage("traces").config
    again = replace(first, task=replace(first.task, first_item=None))
    needs = {"traces": (), "grpo": ("traces",), "more": ("grpo",)}
    done = connected({"traces": traces, "grpo": first, "more": again}, needs)
    assert done["more"].task.first_item == 60000 + 60 * 32


def test_the_first_item_may_change_until_one_was_shown(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "a")
    order = Order(overrides=("task.first_item=7",), run_root=tmp_path, run_name="a", resume=True)
    assert reconfigured(made.run, order).task.first_item == 7
    made.submit("local-1")
    made.begin()
    with pytest.raises(UsageError, match=r"cannot change task\.first_item"):
        reconfigured(made.run, order)


def test_what_was_frozen_before_there_was_such_a_setting_begins_where_it_did(tmp_path: Path) -> None:
    chain = ChainDir(tmp_path / "c")
    chain.path.mkdir()
    save_definition(read_definition(write_chain(tmp_path, _SMALL), chain), chain)
    text = chain.definition.read_text()
    assert "first_item: 75\n" in text
    chain.definition.write_text(text.replace("      first_item: 75\n", ""))
    definition = override(open_definition(chain), ["grpo:resources.nodes=2"], chain)
    assert definition.stage("grpo").config.task.first_item is None


def test_an_evaluation_of_test_files_is_told_what_was_trained_on(r1: Definition) -> None:
    config, sft = r1.stage("evaluate_sft").config, r1.stage("sft").config
    questions = TaskConfig("file", options={"path": "/data/train.jsonl"})
    asking = replace(config, evaluate=EvaluateConfig(path="/data/test.jsonl"))
    rl = replace(r1.stage("grpo").config, task=questions)
    needs = {"sft": (), "rl": ("sft",), "held_out": ("rl",), "asking": ("rl",)}
    done = connected({"sft": sft, "rl": rl, "held_out": config, "asking": asking}, needs)
    assert done["asking"].evaluate.trained_on == [*sft.data.traces, "/data/train.jsonl"]
    assert done["asking"].evaluate.not_searched == []
    assert done["held_out"].evaluate.trained_on == []
    told = replace(asking, evaluate=replace(asking.evaluate, trained_on=["/data/more", "/data/train.jsonl"]))
    done = connected({"sft": sft, "rl": rl, "asking": told}, needs)
    assert done["asking"].evaluate.trained_on == ["/data/more", "/data/train.jsonl", *sft.data.traces]
    several = TaskConfig(
        mix={
            "sums": {"name": "chain_sum"},
            "own": {"name": "file", "options": {"path": "/data/train.parquet"}},
        }
    )
    done = connected(
        {"sft": sft, "rl": replace(rl, task=several), "asking": asking}, needs | {"asking": ("rl",)}
    )
    assert done["asking"].evaluate.trained_on == [*sft.data.traces, "/data/train.parquet"]


def test_what_it_trained_on_and_nobody_can_search_is_named(r1: Definition) -> None:
    sft, rl = r1.stage("sft").config, r1.stage("grpo").config
    stages: dict[str, Any] = {
        "first": RunConfig(stage="pretrain"),
        "tune": replace(sft, data=DataConfig(path="/data/shards")),
        "rl": replace(
            rl, task=TaskConfig(mix={"sums": {"name": "chain_sum"}, "own": {"name": "mine.py:Words"}})
        ),
        "asking": RunConfig(stage="evaluate", evaluate=EvaluateConfig(path="/data/test.jsonl")),
    }
    needs = {"first": (), "tune": ("first",), "rl": ("tune",), "asking": ("rl",)}
    assert sorted(connected(stages, needs)["asking"].evaluate.not_searched) == [
        "data.path=/data/shards (stage tune)",
        "data.recipe=smoke (stage first)",
        "questions of mine.py:Words (stage rl)",
    ]
