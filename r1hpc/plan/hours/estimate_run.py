"""Estimate the cost of a run from its configuration and plan, for `submit` and `estimate JOB.yaml`.

Nobody publishes CPU runs. Our numbers for them come from eleven runs of jobs/smoke.yaml and the stages of
jobs/r1.yaml: 0.1 to 0.4 M parameters and once 26 M, one core per rank, on two shared x86 cores with a local
disk, November 2026. Other cores, more of them per rank, larger models and network file systems may be several
times off in either direction: the interval shows that, and the site's first runs replace it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import is_rl, is_server, samples, trains
from r1hpc.plan.hours.estimate import Estimate, baselines, estimate
from r1hpc.plan.hours.goodput import FailureRates
from r1hpc.plan.hours.memory_options import Beside, MemoryOptions, memory_options
from r1hpc.plan.hours.rl import EAGER_LAYER_S, Batches, RlWork, estimate_rl
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.hours.workload import ASSUMED_GPU, Workload, guessed_cache_bytes
from r1hpc.plan.memory.run import is_offloaded, memory_of_run
from r1hpc.plan.memory.step import MemoryPlan
from r1hpc.plan.memory.vllm import vllm_memory
from r1hpc.plan.model.families import UnknownModelError
from r1hpc.plan.model.shape import ModelShape, load_model_config, model_shape
from r1hpc.plan.run import RunPlan
from r1hpc.plan.topology.batch import Topology, updates_per_rollout, works_out_old_policy
from r1hpc.plan.topology.gpus import Gpu, find_gpu, gpu_type_of
from r1hpc.plan.topology.parts import (
    evaluation_prompts,
    largest_part,
    num_items,
    part_prompts,
    rollout_prompts,
)

_STARTUP_S = Spread(60.0, 180.0, 540.0)
"""From the allocation to an attempt's first step. Assumed, not measured: a file system from which many nodes
read Python, a large model or a first compilation make it several times the median."""
_MEAN_OF_LONGEST = 0.5
"""Mean completion over the longest allowed. Assumed: it changes while a policy learns."""
_ADAPTERS = "adapters need no gradients of the frozen weights, a third of the FLOPs: the estimate is high"
_SHARED = "the exchange between ranks that share a sequence is not counted: the estimate is low"
_FULL_LENGTH = "each sample is counted as data.seq_len tokens: the estimate is high where most are shorter"

CPU_PRIOR = 3
"""Version of the numbers below for CPU runs: ratios to estimates of another version correct nothing."""
CPU_STARTUP_S = 10.0
"""CPU runs: from the allocation to the first step, and from the last step to the end. Measured: 4 to 14 s,
of which 3 to 9 until the first step, mostly importing torch."""
FLOPS_PER_RANK = 4e10
MOST_FLOPS_PER_RANK = 1.3e11
"""Model FLOPs per second of one rank with one core, for a model of 0.4 M parameters and one of 135 M, whose
matrices are large enough to multiply fast; between them by the logarithm of the parameters. Measured: 2.8e10
to 5.5e10 for the small models, 1.3e11 for one of 26 M, and 6e10 for it beside other work. All stages of
jobs/smollm2.yaml (135 M) took 0.63 node-hours; this gives 0.95, since answers are shorter than allowed."""
_SMALL, _LARGE = 4e5, 1.35e8
_CPU_SPREAD = 3.0
"""P90/P50 and P50/P10 of CPU runs. Ours took 0.56 to 1.44 times the P50; the rest is for other machines."""


def estimate_of_run(
    config: RunConfig,
    plan: RunPlan,
    rates: FailureRates | None = None,
    expected_model: Mapping[str, Any] | None = None,
) -> Estimate | None:
    """Return the cost of a submission; None if the plan knows neither parameters nor FLOPs.

    A server's hours depend on its users; its time limit is the most it can cost. Raise UnknownGpuError if the
    run's type of GPU is not in the table.

    Args:
        rates: the site's own failures and preemptions; None takes published ones.
        expected_model: the config.json that an earlier stage of a chain will leave in model.path.
    """
    if is_server(config.stage):
        return None
    on_gpus = plan.topology.num_gpus > 0
    found = _on_gpus(config, plan, rates, expected_model) if on_gpus else _on_cpu(config, plan)
    if found is not None and config.stage == "sft":
        found = replace(found, notes=(_FULL_LENGTH, *found.notes))
    return None if found is None else found.assuming(stage=config.stage)


def _on_gpus(
    config: RunConfig, plan: RunPlan, rates: FailureRates | None, expected_model: Mapping[str, Any] | None
) -> Estimate | None:
    if plan.num_parameters is None or plan.flops_per_token is None:
        return None
    gpu_type = gpu_type_of(config)
    gpu = find_gpu(gpu_type or ASSUMED_GPU)
    shape = shape_of_run(config, plan, expected_model)
    if samples(config.stage):
        beside = _beside(config, plan, gpu, shape) if shape and is_rl(config.stage) else None
        estimated = estimate_rl(_rl_work(config, plan, gpu, shape), rates, shape, beside)
        estimated = estimated.with_startup(_startup_gpu_hours(plan, estimated)).assuming(
            eager_layer_s=EAGER_LAYER_S
        )
    else:
        estimated = _estimate_training(config, plan, _workload(config, plan, gpu, shape), shape, rates)
    notes = []
    if gpu_type is None:
        notes.append(f"cluster.gpu_type is not set: {ASSUMED_GPU} is assumed")
    if is_rl(config.stage) and config.rl.max_resamples:
        notes.append(f"a rollout is counted once, and sampled up to {config.rl.max_resamples + 1} times")
    if config.train.sequence_parallel > 1:
        notes.append(_SHARED)
    if config.model.lora_rank:
        notes.append(_ADAPTERS)
    kept = estimated.notes
    if config.train.sequence_parallel > 1 or config.model.lora_rank:
        # Not the memory of full training on full sequences, since `plan` has the run's own.
        estimated = replace(estimated, memory=None)
        kept = tuple(note for note in kept if not note.startswith("nothing fits"))
    estimated = replace(estimated, notes=(*notes, *kept))
    return estimated.assuming(gpu_given=gpu_type is not None, startup_s=_STARTUP_S.to_json())


def shape_of_run(
    config: RunConfig, plan: RunPlan, expected_model: Mapping[str, Any] | None = None
) -> ModelShape | None:
    """Return the model's shape; None if it is not described, or its family is unknown.

    The plan holds the number of parameters but not the vocabulary, which may be the dataset's: parameters
    grow linearly with it, so two counts give it.
    """
    try:
        model = load_model_config(config, None, expected_model)
        if model.get("vocab_size") is not None:
            return model_shape(model)
        one, two = (model_shape({**model, "vocab_size": size}).num_parameters for size in (1, 2))
        more, rest = divmod((plan.num_parameters or 0) - one, two - one)
        return None if rest or more < 0 else model_shape({**model, "vocab_size": more + 1})
    except (ConfigError, UnknownModelError):
        return None


def _on_cpu(config: RunConfig, plan: RunPlan) -> Estimate | None:
    hours = cpu_node_hours(plan)
    if hours is None:
        return None
    shape = shape_of_run(config, plan)
    return Estimate(
        method="flops",
        gpu_hours=None,
        node_hours=hours,
        assumptions={
            "gpu": None,
            "cpu_prior": CPU_PRIOR,
            "nodes": plan.topology.num_nodes,
            "ranks": plan.topology.world_size,
            "params": plan.num_parameters,
            "active_params": shape.num_active_parameters if shape else plan.num_parameters,
            "tokens": float(plan.total_tokens),
        },
        notes=(
            "on CPUs the estimate rests on a few small runs on two x86 cores: its interval is wide until "
            "runs of this site are known",
        ),
    )


def cpu_node_hours(plan: RunPlan) -> Spread | None:
    """Return the node-hours for all steps of the plan in one attempt."""
    if plan.flops_per_token is None:
        return None
    rate = plan.topology.world_size * flops_per_rank(plan.num_parameters or 0)
    work_s = plan.total_tokens * plan.flops_per_token / rate
    hours = plan.topology.num_nodes * (CPU_STARTUP_S + work_s) / 3600
    return Spread(hours / _CPU_SPREAD, hours, hours * _CPU_SPREAD)


def flops_per_rank(num_parameters: float) -> float:
    """Return the model FLOPs per second of one rank, which grow with the model."""
    at = math.log(max(num_parameters, _SMALL) / _SMALL) / math.log(_LARGE / _SMALL)
    return FLOPS_PER_RANK * math.pow(MOST_FLOPS_PER_RANK / FLOPS_PER_RANK, min(1.0, at))


def as_if_on_gpus(config: RunConfig, plan: RunPlan) -> tuple[dict[str, float], MemoryOptions | None]:
    """Return the rules of thumb and the memory of a CPU run on one A100 per rank, for comparison."""
    gpu, shape = find_gpu(ASSUMED_GPU), shape_of_run(config, plan)
    work = _workload(config, plan, gpu, shape)
    is_only_sampled = samples(config.stage) and not trains(config.stage)
    is_other = is_only_sampled or config.train.sequence_parallel > 1
    return baselines(work), None if is_other else memory_options(work, shape)


def _beside(config: RunConfig, plan: RunPlan, gpu: Gpu, shape: ModelShape) -> Beside:
    """Return reference and sampler of the run's settings, for any ZeRO stage and number of GPUs."""

    def found(zero_stage: int, num_gpus: int) -> MemoryPlan:
        asked = replace(config, deepspeed=replace(config.deepspeed, zero_stage=zero_stage))
        where = Topology(num_gpus, 1, 1)
        return memory_of_run(asked, shape, where, plan.seq_len, gpu.memory_gib, plan.teacher_parameters)

    return found


def _precision(config: RunConfig, gpu: Gpu) -> str:
    """Return the configured precision; emulated FP8 computes in bf16, and a card without bf16 in fp16."""
    asked = "bf16" if config.train.fp8_emulate else config.train.precision.value
    return "fp16" if asked == "bf16" and not gpu.has_bf16 else asked


def _workload(config: RunConfig, plan: RunPlan, gpu: Gpu, shape: ModelShape | None) -> Workload:
    known: dict[str, Any] = {
        "num_gpus": plan.topology.world_size,
        "tokens_per_step": float(plan.tokens_per_step),
        "micro_batch_size": plan.batch.micro_batch_size / config.train.sequence_parallel,
        "precision": _precision(config, gpu),
        "recompute": "full" if config.model.activation_checkpointing else "none",
        "zero_stage": config.deepspeed.zero_stage,
        "offload": is_offloaded(config),
        "stack": "deepspeed",
    }
    tokens, seq_len = float(plan.total_tokens), plan.seq_len
    if shape is not None:
        return Workload.of_shape(shape, tokens=tokens, seq_len=seq_len, gpu=gpu, **known)
    params = float(plan.num_parameters or 0)
    return Workload.of_counts(params=params, tokens=tokens, seq_len=seq_len, gpu=gpu, **known)


def _estimate_training(
    config: RunConfig, plan: RunPlan, work: Workload, shape: ModelShape | None, rates: FailureRates | None
) -> Estimate:
    """Estimate with the run's own save interval, and a start-up for each attempt within the time limit.

    A run also saves at its time limit and at its end, whatever checkpoint.save_every is.
    """
    first = estimate(work, shape=shape)
    wall_s = _ideal_wall_s(plan, first)
    periodic_s = wall_s / plan.num_steps * config.checkpoint.save_every
    found = estimate(
        work,
        shape=shape,
        rates=rates,
        save_time_s=plan.save_wait_s or 0.0,
        save_interval_s=max(1.0, min(periodic_s, wall_s, plan.time_limit_s or math.inf)),
    )
    return found.with_startup(_startup_gpu_hours(plan, first))


def _ideal_wall_s(plan: RunPlan, found: Estimate) -> float:
    assert found.ideal_gpu_hours is not None
    return found.ideal_gpu_hours.p50 / plan.topology.num_gpus * 3600


def _startup_gpu_hours(plan: RunPlan, found: Estimate) -> Spread:
    """Return the start-up of all attempts in the time limit; starts at a site are alike, so widths add."""
    attempts = max(1, math.ceil(_ideal_wall_s(plan, found) / plan.time_limit_s)) if plan.time_limit_s else 1
    return _STARTUP_S * (attempts * plan.topology.num_gpus / 3600)


def _rl_work(config: RunConfig, plan: RunPlan, gpu: Gpu, shape: ModelShape | None) -> RlWork:
    rollout, params = config.rollout, float(plan.num_parameters or 0)
    active = params if shape is None else float(shape.num_active_parameters)
    learns, has_critic = is_rl(config.stage), config.rl.algorithm == "ppo"
    per_rollout = rollout.num_prompts * rollout.num_generations
    batches, evaluation_batches = _batches(config, plan.topology.world_size)
    # Before the first step, after the last, and between (train/rl/rl.py).
    every = config.evaluate.every
    num_evaluations = 2 + ((config.train.num_steps - 1) // every if every else 0)
    # The parameters that one token meets in the teacher or reference. An older plan has only the total.
    reference = active if config.rl.kl_coef > 0 else 0.0
    if plan.teacher_parameters:
        reference = float(plan.teacher_active_parameters or plan.teacher_parameters)
    return RlWork(
        params=params,
        gpu=gpu,
        num_gpus=plan.topology.num_gpus,
        num_rollouts=math.ceil(config.train.num_steps / updates_per_rollout(config)) if learns else 1,
        sequences_per_rollout=per_rollout if learns else num_items(config) * sum(_answers(config)),
        prompt_length=rollout.max_prompt_length,
        completion_length=max(1.0, _MEAN_OF_LONGEST * rollout.max_completion_length),
        max_completion_length=rollout.max_completion_length,
        cache_bytes_per_token=(
            2 * 2.0 * shape.num_layers * shape.num_key_value_heads * shape.head_dim
            if shape
            else guessed_cache_bytes(params)
        ),
        active_params=active,
        eager_layers=shape.num_layers if shape is not None and rollout.engine == "sampler" else 0,
        precision=_precision(config, gpu),
        # The policy computes the old log-probabilities, the critic the values for PPO's advantages
        # (train/rl/update.py, prepare).
        logprob_passes=int(works_out_old_policy(config)),
        num_iterations=config.rl.num_iterations,
        critic_params=active if has_critic else 0.0,
        critic_passes=int(has_critic),
        reference_params=reference,
        recompute=config.model.activation_checkpointing,
        rollout_batches=batches,
        num_evaluations=num_evaluations if learns else 0,
        evaluation_batches=evaluation_batches,
        is_trained=learns,
        is_whole=True,
        cache_tokens=_cache_tokens(config, plan, gpu, shape),
    )


def _cache_tokens(config: RunConfig, plan: RunPlan, gpu: Gpu, shape: ModelShape | None) -> float | None:
    """Return the tokens that vLLM's share of a card holds; None for another engine or an unknown shape."""
    memory = vllm_memory(config, shape, plan.topology, gpu.memory_gib) if shape is not None else None
    if memory is None:
        return None
    sequences = (memory.given_gib - memory.fixed_gib) / (memory.least_gib - memory.fixed_gib)
    return max(0.0, sequences) * (config.rollout.max_prompt_length + config.rollout.max_completion_length)


def _answers(config: RunConfig) -> tuple[int, ...]:
    """Return the completions of each item decoded together, by kind: an evaluation's greedy one, and its
    samples."""
    return (config.generate.num_samples,) if config.stage == "generate" else (1, config.evaluate.num_samples)


def _batches(config: RunConfig, num_ranks: int) -> tuple[tuple[Batches, ...], tuple[Batches, ...]]:
    """Return the batches of a rollout, or of a stage that only samples; and of an evaluation of stage rl."""
    rollout: tuple[Batches, ...] = ()
    if is_rl(config.stage):  # cut like train/rl/collect.py, and train/generate/evaluate.py
        together = rollout_prompts(config, num_ranks)
        num = _rounds(config.rollout.num_prompts, together, num_ranks)
        rollout = (Batches(num, together * config.rollout.num_generations),)
        together = evaluation_prompts(config, num_ranks)
        num = _rounds(num_items(config), together, num_ranks)
    else:  # cut like train/generate/generate.py: one rank makes a part
        part, together = largest_part(config, num_ranks), part_prompts(config, num_ranks)
        num = _rounds(num_items(config), part, num_ranks) * math.ceil(part / together)
    answers = tuple(Batches(num, together * answers) for answers in _answers(config))
    return (rollout, answers) if rollout else (answers, ())


def _rounds(items: int, together: int, num_ranks: int) -> int:
    """Return the batches of `together` items made by the rank with the most."""
    return math.ceil(math.ceil(items / together) / num_ranks)
