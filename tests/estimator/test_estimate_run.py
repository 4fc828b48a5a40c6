"""The estimate of a submission, from its configuration and plan."""

import json
from dataclasses import replace
from typing import Any

import pytest

from r1hpc.config.load import load
from r1hpc.config.schema import RunConfig
from r1hpc.estimator.estimate import Estimate
from r1hpc.estimator.estimate_run import estimate_of_run, shape_of_run
from r1hpc.estimator.estimate_text import estimate_text
from r1hpc.plan.hardware import UnknownGpuError
from r1hpc.plan.model import load_model_config
from r1hpc.plan.run import RunPlan, make_plan
from r1hpc.plan.shape import model_shape

_VOCABULARY = 50_304


def _run(
    *overrides: str, gpus_per_node: int = 8, vocab_size: int | None = _VOCABULARY
) -> tuple[RunConfig, RunPlan]:
    config = load("train", overrides)
    return config, make_plan(config, gpus_per_node=gpus_per_node, vocab_size=vocab_size, time_limit_s=86400)


def _estimate(*overrides: str, **change: Any) -> Estimate:
    found = estimate_of_run(*_run(*overrides, **change))
    assert found is not None
    return found


def test_a_training_run() -> None:
    found = _estimate("cluster.gpu_type=a100-80gb")
    assert found.gpu_hours is not None
    assert found.ideal_gpu_hours is not None
    assert found.gpu_hours.p10 < found.gpu_hours.p50 < found.gpu_hours.p90
    # Start-up of one attempt on 32 GPUs and saves come on top.
    assert found.gpu_hours.p50 > found.ideal_gpu_hours.p50 + 32 * 180 / 3600
    assert found.assumptions["recompute"] == "full"
    assert found.assumptions["zero_stage"] == 2
    assert found.assumptions["shape"] == "exact"
    assert found.memory is not None
    assert found.memory.best is not None
    json.dumps(found.to_json(), allow_nan=False)


def test_adapters_are_not_told_that_full_training_does_not_fit() -> None:
    big = ("model.config.hidden_size=7168", "model.config.num_hidden_layers=200")
    words = ("stage=sft", "resources.nodes=1", *big)
    full, adapters = (_estimate(*words, *more, gpus_per_node=1) for more in ((), ("model.lora_rank=8",)))
    assert any("nothing fits" in note for note in full.notes)
    assert adapters.memory is None
    assert not any("nothing fits" in note for note in adapters.notes)
    assert any("frozen weights" in note for note in adapters.notes)


def test_ranks_that_share_sequences_are_said_to_exchange() -> None:
    words = ("resources.nodes=1", "data.seq_len=2048", "train.micro_batch_size=1")
    found = _estimate(*words, "train.sequence_parallel=2")
    assert found.memory is None, "the table of options is of whole sequences"
    assert any("the exchange between the ranks" in note for note in found.notes)
    assert found.ideal_gpu_hours is not None


def test_an_unset_gpu_is_said_to_be_assumed() -> None:
    assumed = _estimate()
    assert "gpu_type is not set" in assumed.notes[0]
    assert assumed.assumptions["gpu_given"] is False
    assert _estimate("cluster.gpu_type=a100").assumptions["gpu_given"] is True
    with pytest.raises(UnknownGpuError, match="rx7900"):
        _estimate("cluster.gpu_type=rx7900")


def test_a_run_saves_at_its_time_limit_whatever_the_interval() -> None:
    """512 GPUs for weeks in attempts of a day: saving never in between loses half an attempt, not the run."""
    big = ("cluster.gpu_type=a100", "resources.nodes=64", "train.num_steps=1000000")
    never = _estimate(*big, "train.global_batch_size=4096", "checkpoint.save_every=1000000")
    assert never.goodput is not None
    assert never.ideal_gpu_hours is not None
    assert never.ideal_gpu_hours.p50 / 512 * 3600 > 3 * 86400
    assert never.goodput.save_interval_s == 86400
    assert never.goodput.goodput > 0.5
    short = _estimate("cluster.gpu_type=a100", "train.num_steps=1000", "checkpoint.save_every=1000000")
    assert short.goodput is not None
    assert short.ideal_gpu_hours is not None
    assert short.goodput.save_interval_s == pytest.approx(short.ideal_gpu_hours.p50 / 32 * 3600)


def test_a_faster_card_costs_less() -> None:
    slow, fast = (_estimate(f"cluster.gpu_type={name}") for name in ("a100", "h100"))
    assert slow.gpu_hours is not None
    assert fast.gpu_hours is not None
    assert fast.gpu_hours.p50 < slow.gpu_hours.p50


@pytest.mark.parametrize(
    "model",
    [
        "{model_type: gpt2}",
        "{model_type: llama, hidden_size: 448, num_attention_heads: 7, num_key_value_heads: 7}",
    ],
)
def test_the_dataset_s_vocabulary_is_found_again(model: str) -> None:
    config, plan = _run(f"model.config={model}", "data.seq_len=512")
    expected = model_shape(load_model_config(config, _VOCABULARY))
    assert shape_of_run(config, plan) == expected
    assert shape_of_run(config, replace(plan, num_parameters=17)) is None


def test_what_the_plan_does_not_know() -> None:
    assert estimate_of_run(*_run(vocab_size=None)) is None


def test_a_model_that_another_stage_has_yet_to_write() -> None:
    config, plan = _run("cluster.gpu_type=a100")
    later = replace(config, model=replace(config.model, path="/nowhere/model", config={}))
    assert shape_of_run(later, plan) is None
    found = estimate_of_run(later, plan)
    assert found is not None
    assert found.assumptions["shape"].startswith("guessed")


def test_a_cpu_run_has_node_hours() -> None:
    config = load("smoke")
    plan = make_plan(config, gpus_per_node=0, vocab_size=512, time_limit_s=1800)
    found = estimate_of_run(config, plan)
    assert found is not None
    assert found.gpu_hours is None
    assert found.node_hours is not None
    assert found.node_hours.p50 > 0
    assert found.assumptions["gpu"] is None
    value = found.to_json()
    assert value["baselines"].keys() >= {"seed_formula", "6nd_at_40"}
    assert value["memory"]["num_gpus"] == plan.topology.world_size
    assert "baselines" not in estimate_text(found), "nobody asked what it would cost on GPUs"


_RL = (
    "stage=rl",
    "cluster.gpu_type=a100",
    "rollout.num_prompts=64",
    "train.global_batch_size=512",
    "data.seq_len=512",
)


def test_reinforcement_learning_has_phases() -> None:
    grpo = _estimate(*_RL)
    ppo = _estimate(*_RL, "rl.algorithm=ppo")
    assert set(grpo.phases) >= {"decode", "update", "logprobs"}
    assert grpo.gpu_hours is not None
    assert ppo.gpu_hours is not None
    assert ppo.gpu_hours.p50 > grpo.gpu_hours.p50
    reference = _estimate(*_RL, "rl.kl_coef=0.01")
    assert reference.phases["logprobs"] == pytest.approx(2 * grpo.phases["logprobs"])


def test_rl_of_a_mixture_computes_with_what_a_token_meets() -> None:
    heads = "num_attention_heads: 8, num_key_value_heads: 8"
    model = f"{{model_type: qwen3_moe, num_hidden_layers: 4, hidden_size: 512, {heads}}}"
    known = (*_RL, "rl.algorithm=ppo", f"model.config={model}")
    found = _estimate(*known)
    assert found.assumptions["active_params"] < 0.5 * found.assumptions["params"]
    one = _estimate(*known[:-2], known[-1])
    assert found.phases["update"] == pytest.approx(2 * one.phases["update"]), "so does the critic"
    assert found.memory is not None
    assert found.baselines["6nd_at_40"] > 0


def test_sampling_stages_only_sample() -> None:
    found = _estimate("stage=evaluate", "cluster.gpu_type=a100")
    assert set(found.phases) == {"prefill", "decode"}
