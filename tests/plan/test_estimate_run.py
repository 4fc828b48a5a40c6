"""The estimate of a submission, from its configuration and plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from r1hpc.config.load import load
from r1hpc.config.schema.rl import RlConfig
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.plan.hours.estimate import Estimate
from r1hpc.plan.hours.estimate_run import as_if_on_gpus, estimate_of_run, shape_of_run
from r1hpc.plan.hours.text import estimate_text
from r1hpc.plan.model.shape import load_model_config, model_shape
from r1hpc.plan.run import RunPlan, make_plan
from r1hpc.plan.topology.batch import works_out_old_policy
from r1hpc.plan.topology.gpus import UnknownGpuError
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rl.ppo import ActorCritic
from r1hpc.train.rl.rollout import Rollout
from r1hpc.train.rl.update import Updater
from tests.train.test_update import PROMPTS, PlainEngine, groups, network
from tests.train.test_update import config as trained

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


def test_fine_tuning_is_said_to_count_full_sequences() -> None:
    config = load("smoke", ["stage=sft"])
    on_cpu = estimate_of_run(config, make_plan(config, gpus_per_node=0, vocab_size=512))
    assert on_cpu is not None
    for found in (_estimate("stage=sft"), on_cpu):
        assert found.notes[0].startswith("each sample is counted as data.seq_len tokens")
    assert not any("each sample" in note for note in _estimate().notes)


def test_ranks_that_share_sequences_are_said_to_exchange() -> None:
    words = ("resources.nodes=1", "data.seq_len=2048", "train.micro_batch_size=1")
    found = _estimate(*words, "train.sequence_parallel=2")
    assert found.memory is None, "the table of options is of whole sequences"
    assert any("the exchange between ranks" in note for note in found.notes)
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
    to_come = load_model_config(config, None)
    assert shape_of_run(later, plan, to_come) == shape_of_run(config, plan)
    told = estimate_of_run(later, plan, expected_model=to_come)
    there = estimate_of_run(config, plan)
    assert told is not None
    assert there is not None
    assert told.gpu_hours == there.gpu_hours


def test_a_cpu_run_has_node_hours() -> None:
    config = load("smoke")
    plan = make_plan(config, gpus_per_node=0, vocab_size=512, time_limit_s=1800)
    found = estimate_of_run(config, plan)
    assert found is not None
    assert found.gpu_hours is None
    assert found.node_hours is not None
    assert found.node_hours.p50 > 0
    assert found.assumptions["gpu"] is None
    rules, memory = as_if_on_gpus(config, plan)
    assert rules.keys() >= {"seed_formula", "6nd_at_40"}
    assert memory is not None
    assert memory.num_gpus == plan.topology.world_size
    assert "baselines" not in estimate_text(found), "nobody asked what it would cost on GPUs"


_RL = (
    "stage=rl",
    "cluster.gpu_type=a100",
    "rollout.num_prompts=64",
    "train.global_batch_size=512",
    "data.seq_len=512",
)


def test_vllm_decodes_in_the_cache_that_it_is_given() -> None:
    words = (
        *_RL,
        "rollout.engine=vllm",
        "rollout.max_completion_length=384",
        "rollout.max_prompt_length=128",
    )
    usual, large, small = (
        _estimate(*words, f"rollout.vllm_options={{{option}}}").phases["decode"]
        for option in ("", "gpu_memory_utilization: 0.8", f"kv_cache_memory_bytes: {2**25}")
    )
    assert usual == large, "both hold all that decodes together"
    assert small > 1.5 * usual


def test_reinforcement_learning_has_phases() -> None:
    grpo = _estimate(*_RL)
    ppo = _estimate(*_RL, "rl.algorithm=ppo")
    assert set(grpo.phases) >= {"decode", "update", "logprobs"}
    assert grpo.gpu_hours is not None
    assert ppo.gpu_hours is not None
    assert ppo.gpu_hours.p50 > grpo.gpu_hours.p50
    # With one update a rollout the old policy is the policy, and what it says is worked out in the update.
    assert grpo.phases["logprobs"] == 0
    reference = _estimate(*_RL, "rl.kl_coef=0.01")
    assert reference.phases["logprobs"] == pytest.approx(reference.phases["update"] * 2 / 8)
    # Before its updates PPO asks the critic for the values.
    assert ppo.phases["logprobs"] == pytest.approx(ppo.phases["update"] * 2 / (8 * 2))


def test_a_reference_or_teacher_is_asked_in_every_pass_over_a_rollout() -> None:
    once, twice = (
        _estimate(*_RL, "rl.kl_coef=0.01", f"rl.num_iterations={num}", f"train.num_steps={num * 1000}")
        for num in (1, 2)
    )
    assert twice.phases["decode"] == pytest.approx(once.phases["decode"])
    assert twice.phases["logprobs"] == pytest.approx(2 * once.phases["logprobs"])
    assert once.phases["logprobs"] > 0
    config, plan = _run(*_RL, "rl.num_iterations=2")
    taught = replace(config, rl=RlConfig(algorithm="distill", teacher="x", num_iterations=2))
    found = estimate_of_run(taught, replace(plan, teacher_parameters=3 * (plan.num_parameters or 0)))
    assert found is not None
    assert found.phases["logprobs"] == pytest.approx(3 * found.phases["update"] * 2 / 8)


def test_a_mixture_teaches_with_what_a_token_meets(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 4}
    teacher = {"model_type": "qwen3_moe", "hidden_size": 512, "vocab_size": _VOCABULARY, **heads}
    (tmp_path / "config.json").write_text(json.dumps(teacher))
    shape = model_shape(teacher)
    config, plan = _run(*_RL, "rl.algorithm=distill", f"rl.teacher={tmp_path}")
    assert plan.teacher_parameters == shape.num_parameters
    assert plan.teacher_active_parameters == shape.num_active_parameters < shape.num_parameters / 2
    of_before = {k: v for k, v in plan.to_json().items() if k != "teacher_active_parameters"}
    for made, met in (
        (plan, shape.num_active_parameters),
        (RunPlan.from_json(of_before), shape.num_parameters),
    ):
        found = estimate_of_run(config, made)
        assert found is not None
        student = found.assumptions["active_params"]
        assert found.phases["logprobs"] / found.phases["update"] == pytest.approx(2 * met / (8 * student))


@pytest.mark.parametrize("importance", ["none", "truncated"])
def test_every_pass_of_ppo_before_its_updates_is_of_policy_or_critic(importance: str) -> None:
    """Counted in the trainer, in which policy and critic are one network."""
    made = trained(algorithm="ppo", importance_sampling=importance)
    policy, critic = network(), network().base_model
    passes = {"policy": 0, "critic": 0}
    for name, module in (("policy", policy), ("critic", critic)):
        module.register_forward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    updater = Updater(made, Group(0, 0, 1, torch.device("cpu")), 0, policy, None)
    updater.prepare(PlainEngine(ActorCritic(policy, critic)), Rollout(groups(), "policy", 4), PROMPTS)
    micro_batches = -(-made.train.global_batch_size // made.train.micro_batch_size)
    of_each = {name: count / micro_batches for name, count in passes.items()}
    of_policy = int(works_out_old_policy(made))
    assert of_each == {"policy": of_policy, "critic": 1}
    words = ("rl.algorithm=ppo", "rl.num_iterations=2", f"rl.importance_sampling={importance}")
    phases = _estimate(*_RL, *words).phases
    # An update of both computes 8 FLOPs a weight and token, with recomputation, and there are two.
    assert phases["logprobs"] == pytest.approx(phases["update"] * 2 * (of_policy + 1) / (8 * 2 * 2))


def test_a_sampler_that_stays_during_updates_is_there_beside_the_training() -> None:
    words = (*_RL, "rollout.engine=vllm", "rollout.max_completion_length=1024")
    found = {}
    for name, more in (("sleeps", ()), ("stays", ("rollout.vllm_options={enable_sleep_mode: false}",))):
        config, plan = _run(*words, *more)
        estimate = estimate_of_run(config, plan)
        assert estimate is not None
        assert estimate.memory is not None
        assert plan.memory is not None
        found[name] = plan.memory.sampler_gib, estimate.memory
    share, options = found["stays"]
    for option in (*options.fits, options.smallest):
        memory = option.memory
        assert memory.total_gib == pytest.approx(memory.staying_gib + memory.update_gib + share)
    share, options = found["sleeps"]
    for option in (*options.fits, options.smallest):
        memory = option.memory
        assert memory.total_gib == pytest.approx(memory.staying_gib + max(memory.update_gib, share))


@pytest.mark.parametrize(
    ("rl", "engine", "precision", "num_iterations"),
    [
        ({}, "sampler", "bf16", 2),
        ({}, "vllm", "fp32", 2),
        ({}, "vllm", "fp32", 1),
        ({"importance_sampling": "none"}, "vllm", "bf16", 2),
        ({"importance_sampling": "truncated"}, "sampler", "fp32", 2),
        ({"ratio": "sequence"}, "sampler", "bf16", 2),
        ({"ratio": "sequence"}, "sampler", "fp32", 2),
        ({"algorithm": "distill", "teacher": "x"}, "vllm", "bf16", 2),
    ],
)
def test_the_old_policy_s_pass_is_counted_where_the_trainer_makes_one(
    rl: dict[str, Any], engine: str, precision: str, num_iterations: int
) -> None:
    made = trained(**rl)
    config = replace(
        made,
        train=replace(made.train, precision=Precision(precision)),
        rollout=replace(made.rollout, engine=engine),
        rl=replace(made.rl, num_iterations=num_iterations),
    )
    built = PlainEngine(network())
    updater = Updater(config, Group(0, 0, 1, torch.device("cpu")), 0, built.module, None)
    prepared = updater.prepare(built, Rollout(groups(), "policy", 4), PROMPTS)
    assert works_out_old_policy(config) == (prepared.old_logprobs is not None)


_EVALUATED = (*_RL, "evaluate.num_items=512", "evaluate.num_samples=8", "rollout.prompts_per_batch=8")


def test_evaluations_of_rl_are_counted() -> None:
    """One before the first step, one after the last, and every so many in between."""
    asked = {
        every: _estimate(*_EVALUATED, "train.num_steps=200", f"evaluate.every={every}")
        for every in (0, 50, 99, 300)
    }
    spent = {every: found.phases["evaluation"] for every, found in asked.items()}
    assert spent[0] == spent[300] > 0
    assert spent[50] == pytest.approx(spent[0] * 5 / 2)
    assert spent[99] == pytest.approx(spent[0] * 4 / 2)
    assert {every: found.assumptions["evaluations"] for every, found in asked.items()} == {
        0: 2,
        50: 5,
        99: 4,
        300: 2,
    }
    # Each costs what a stage that asks the same in the same batches does, and a hand-over of the weights.
    words = [word for word in _EVALUATED if word != "stage=rl"]
    stage = _estimate("stage=evaluate", *words, "generate.items_per_part=16")
    assert asked[0].phases["decode"] > 0
    hand_over = asked[0].phases["hand_over"] / 200
    assert spent[0] / 2 == pytest.approx(stage.phases["prefill"] + stage.phases["decode"] + hand_over)


def test_several_test_files_are_counted_with_all_their_questions() -> None:
    files = "{first: {path: a.jsonl, num_items: 400}, second: {path: b.jsonl, num_items: 112}}"
    several = _estimate(*_EVALUATED, f"evaluate.sets={files}")
    assert several.phases["evaluation"] == _estimate(*_EVALUATED).phases["evaluation"]


def test_an_evaluation_decodes_greedily_too() -> None:
    words = ("cluster.gpu_type=a100", "generate.items_per_part=64", "rollout.prompts_per_batch=64")
    greedy_and_one = _estimate("stage=evaluate", *words, "evaluate.num_items=2048", "evaluate.num_samples=1")
    one = _estimate("stage=generate", *words, "generate.num_items=2048", "generate.num_samples=1")
    assert greedy_and_one.phases["decode"] == pytest.approx(2 * one.phases["decode"])
    assert greedy_and_one.assumptions["sequences"] == 2 * one.assumptions["sequences"] == 4096


def test_what_is_decoded_in_small_batches_takes_longer_and_idle_gpus_are_paid_for() -> None:
    many = ["stage=generate", "cluster.gpu_type=a100", "generate.num_items=4096"]
    many.append("generate.items_per_part=128")
    whole, small = (_estimate(*many, f"rollout.prompts_per_batch={size}") for size in (0, 8))
    assert small.phases["decode"] > 4 * whole.phases["decode"]
    few = ("stage=evaluate", "cluster.gpu_type=a100", "evaluate.num_items=256", "generate.items_per_part=256")
    one, eight = (_estimate(*few, "resources.nodes=1", gpus_per_node=gpus) for gpus in (1, 8))
    assert eight.phases["decode"] == pytest.approx(8 * one.phases["decode"], rel=0.2)


def test_starting_is_paid_for_by_stages_that_sample() -> None:
    found = _estimate("stage=evaluate", "cluster.gpu_type=a100", "evaluate.num_items=256")
    assert found.gpu_hours is not None
    assert found.gpu_hours.p50 > 32 * 180 / 3600
    assert found.wall_hours[32].p50 > 180 / 3600


def test_rollouts_that_are_sampled_again_are_named() -> None:
    assert not any("sampled up to" in note for note in _estimate(*_RL).notes)
    found = _estimate(*_RL, "rl.max_resamples=3")
    assert any("sampled up to 4 times" in note for note in found.notes)


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


def test_a_short_run_is_as_uncertain_as_its_start_up() -> None:
    """The hours of a run of minutes are its start-up, which nobody knows within a percent."""
    found = _estimate("cluster.gpu_type=a100", "train.num_steps=1")
    assert found.gpu_hours is not None
    assert found.gpu_hours.p90 / found.gpu_hours.p50 > 2.5
    assert found.gpu_hours.p50 / found.gpu_hours.p10 > 2.5
    assert found.drivers["start-up"] > 0.9
    assert sum(found.drivers.values()) == pytest.approx(1, abs=0.02)
    assert found.assumptions["startup_s"] == {"p10": 60, "p50": 180, "p90": 540}
