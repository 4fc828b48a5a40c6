"""Reinforcement learning begins where the stages before it ended, and an evaluation knows what they saw."""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.reasoning import EvaluateConfig, TaskConfig
from r1hpc.submission.chain_file import (
    Definition,
    open_definition,
    override,
    read_definition,
    save_definition,
)
from r1hpc.submission.chain_folder import ChainDir
from r1hpc.submission.chain_items import connected, refuse_shown_again
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import reconfigured
from tests.recorded import RecordedRun
from tests.submission.chains import write_chain

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
    with pytest.raises(UsageError, match=r"stage grpo: .* in another order, .* give grpo:task.seed=0"):
        first_item(seed=1)


def test_a_second_rl_stage_goes_on_after_the_first(r1: Definition) -> None:
    first, traces = r1.stage("grpo").config, r1.stage("traces").config
    again = replace(first, task=replace(first.task, first_item=None))
    needs = {"traces": (), "grpo": ("traces",), "more": ("grpo",)}
    done = connected({"traces": traces, "grpo": first, "more": again}, needs)
    assert done["more"].task.first_item == 60000 + 60 * 32


def test_a_change_by_which_items_would_be_shown_again_is_refused(tmp_path: Path) -> None:
    chain = ChainDir(tmp_path / "c")
    stages = _SMALL + "  - {name: more, stage: rl}\n"
    frozen = read_definition(write_chain(tmp_path, stages), chain)
    first = frozen.stage("more").config.task.first_item
    assert first is not None

    def change(*overrides: str, begun: Collection[str] = (), queued: Collection[str] = ()) -> None:
        changed = override(frozen, overrides, chain)
        refuse_shown_again(frozen.configs, changed.configs, frozen.needs, begun, queued)

    change("grpo:resources.nodes=2")
    change("grpo:train.num_steps=5000", begun=["more"])
    with pytest.raises(
        UsageError, match=rf"begin with item {first} .* more:task.first_item=(\d+) "
    ) as caught:
        change("grpo:train.num_steps=5000")
    enough = re.search(r"more:task.first_item=\d+", str(caught.value))
    assert enough is not None
    change("grpo:train.num_steps=5000", enough[0])
    change("more:resources.nodes=2")
    change("more:task.first_item=0")
    with pytest.raises(UsageError, match=r"cancel more, then give more:task\.first_item="):
        change("grpo:train.num_steps=5000", queued=["more"])


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
    assert done["held_out"].evaluate.trained_on == []
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
