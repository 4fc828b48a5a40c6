"""Stages in parts: as many parts as keep every rank busy, and a size that is settled once."""

from dataclasses import replace
from typing import Any

import pytest

from r1hpc.config.load import load
from r1hpc.config.schema.rl import EvaluateConfig, GenerateConfig, RolloutConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.run import make_plan
from r1hpc.plan.topology.parts import (
    idle_ranks,
    largest_part,
    num_parts,
    part_items,
    prompts_together,
    rows_together,
    with_part_size,
)


def asked(num_items: int, **generate: Any) -> RunConfig:
    evaluate = EvaluateConfig(num_items=num_items, num_samples=16)
    return RunConfig(stage="evaluate", evaluate=evaluate, generate=GenerateConfig(**generate))


@pytest.mark.parametrize(
    ("num_items", "num_ranks", "parts"),
    [
        (1819, 32, 122),  # GSM8K's test part and MATH-500 on four nodes
        (1819, 1, 8),  # at most 256 items a part
        (30, 8, 30),  # AIME, with however many samples
        (30, 1, 4),
        (16, 4, 16),  # docs/own-data.md
        (1, 4, 1),
    ],
)
def test_every_rank_has_parts_where_nothing_is_said(num_items: int, num_ranks: int, parts: int) -> None:
    config = with_part_size(asked(num_items), num_ranks)
    assert num_parts(config) == parts
    assert parts >= min(num_items, num_ranks)
    items = [index for number in range(parts) for index in part_items(config, number)]
    assert items == list(range(num_items))


def test_a_size_that_is_given_or_settled_stays() -> None:
    given = asked(1819, items_per_part=256)
    assert with_part_size(given, 32) == given
    settled = with_part_size(asked(1819), 32)
    assert with_part_size(settled, 8) == settled
    trained = replace(asked(1819), stage="rl")
    assert with_part_size(trained, 32) == trained


def test_ranks_that_get_nothing_are_told_of() -> None:
    (said,) = idle_ranks(asked(1819, items_per_part=256), 32)
    assert said == (
        "24 of 32 ranks get nothing to do: 1819 items in parts of 256 make 8; take 8 ranks or fewer, or "
        "begin the run without generate.items_per_part: it then follows from the ranks"
    )
    (said,) = idle_ranks(with_part_size(asked(30), 32), 32)
    assert said == "2 of 32 ranks get nothing to do: 30 items in parts of 1 make 30; take 30 ranks or fewer"
    assert idle_ranks(with_part_size(asked(1819), 32), 32) == []
    assert idle_ranks(RunConfig(stage="rl"), 32) == []
    (said,) = idle_ranks(RunConfig(stage="rl", rollout=RolloutConfig(num_prompts=32)), 64)
    assert said.startswith(
        "32 of 64 ranks wait in each rollout: 32 prompts are dealt whole, and make 32 shares"
    )
    (said,) = idle_ranks(RunConfig(stage="rl", rollout=RolloutConfig(num_prompts=32)), 24)
    assert said.startswith(
        "8 of 24 ranks wait in each rollout: 32 prompts are dealt whole, and make 16 shares"
    )
    cut_smaller = RolloutConfig(num_prompts=32, prompts_per_batch=1)
    assert idle_ranks(RunConfig(stage="rl", rollout=cut_smaller), 24) == []


@pytest.mark.parametrize(
    ("num_items", "items_per_part", "per_batch", "together"),
    [(1819, 256, 0, 256), (1819, 256, 32, 32), (1819, None, 0, 15), (10, 256, 0, 10), (10, 256, 4, 4)],
)
def test_what_a_rank_decodes_together_of_a_part(
    num_items: int, items_per_part: int | None, per_batch: int, together: int
) -> None:
    config = replace(asked(num_items), rollout=RolloutConfig(prompts_per_batch=per_batch))
    generate = GenerateConfig(num_items=num_items, num_samples=3, items_per_part=items_per_part)
    config = replace(config, generate=generate)
    settled = with_part_size(config, 32)
    parts = [part_items(settled, number) for number in range(num_parts(settled))]
    assert max(map(len, parts)) == largest_part(config, 32)
    assert prompts_together(config, 32) == together
    assert rows_together(config, 32) == 16 * together, "of each the samples; the greedy one is asked before"
    assert rows_together(replace(config, stage="generate"), 32) == 3 * together
    by_vllm = replace(config, rollout=replace(config.rollout, engine="vllm"))
    assert prompts_together(by_vllm, 32) == largest_part(config, 32)


@pytest.mark.parametrize("engine", ["sampler", "vllm"])
def test_what_a_rank_of_stage_rl_decodes_together_is_a_rollout_or_an_evaluation(engine: str) -> None:
    """The sampler evaluates with no more rows at once than it rolls out, vLLM bounds its cache itself."""
    rollout = RolloutConfig(num_prompts=32, num_generations=8, engine=engine)
    config = replace(asked(256), stage="rl", rollout=rollout)
    found = prompts_together(config, 4), rows_together(config, 4)
    assert found == {"sampler": (8, 64), "vllm": (64, 64 * 16)}[engine]
    per_batch = replace(config, rollout=replace(rollout, prompts_per_batch=6))
    found = prompts_together(per_batch, 4), rows_together(per_batch, 4)
    assert found == {"sampler": (6, 6 * 16), "vllm": (64, 64 * 16)}[engine]


def test_the_plan_is_of_these_parts() -> None:
    """Also where nothing is settled: an estimate on other GPUs than the job asks for."""
    shape = "model.config={model_type: gpt2, n_positions: 64, vocab_size: 27}"
    words = ["stage=evaluate", shape, "model.from_scratch=true", "evaluate.num_items=1819"]
    config = load(None, [*words, "rollout.max_prompt_length=16", "rollout.max_completion_length=16"])
    plans = {nodes: make_plan(config, gpus_per_node=8, num_nodes=nodes) for nodes in (1, 4)}
    assert {nodes: (plan.batch.global_batch_size, plan.num_steps) for nodes, plan in plans.items()} == {
        1: (57, 32),
        4: (15, 122),
    }
    small, large = (plan.memory for plan in (plans[4], plans[1]))
    assert small is not None
    assert large is not None
    assert small.sampler_gib < large.sampler_gib  # a part is decoded together
