"""Compute the estimate of the command `estimate` from its flags (flags.py), without a job file."""

import argparse
import dataclasses
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_duration
from r1hpc.plan.hours.estimate import BYTES_PER_TOKEN, Estimate, estimate, seed_estimate
from r1hpc.plan.hours.goodput import FailureRates
from r1hpc.plan.hours.rl import RlWork, estimate_rl
from r1hpc.plan.hours.workload import (
    ASSUMED_GPU,
    RECOMPUTATION,
    Workload,
    check_amount,
    check_choice,
    guessed_cache_bytes,
    parse_count,
)
from r1hpc.plan.model.shape import ModelShape, cache_values, model_shape, read_config
from r1hpc.plan.topology.gpus import Gpu, find_gpu

_LEAST_GOODPUT = 0.01
_LONGEST_S = 1e9
_MOST_SEQUENCES = 1e15
_MOST_GB = 4e8
_LARGEST_NUMBER = 1e6
"""Most TFLOP/s, GiB or TB/s of a card."""
_AS_GIVEN = ("num_gpus", "micro_batch_size", "zero_stage", "offload", "tensor_parallel", "pipeline_parallel")
"""Flags that are fields of a Workload."""
_PRECISION_ALIASES = {
    **dict.fromkeys(("bfloat16", "amp_bf16"), "bf16"),
    **dict.fromkeys(("float16", "half", "amp_fp16"), "fp16"),
    "amp_fp8": "fp8",
    **dict.fromkeys(("mxfp8", "float8"), "fp8"),
    "nvfp4": "fp4",
    "float32": "fp32",
}
_FULL_HEADS = (
    "the model's shape is unknown: its cache is guessed from --params, with keys and values for every head. "
    "Grouped heads and MLA cache less: give --model-config FILE"
)
_RECOMPUTE_ALIASES = {"yes": "full", "true": "full", "no": "none", "false": "none"}


def estimate_of_flags(arguments: argparse.Namespace) -> Estimate:
    """Return the estimate of the run that the flags describe.

    Raise UsageError if too little is given, or a value that no run can have.
    """
    if arguments.params is None and arguments.model_config is None:
        raise UsageError(
            "nothing to estimate: give a job file, or --params 7B --tokens 1T, with --gpu a100-80gb and "
            "--num-gpus 64 where they are known"
        )
    if arguments.method == "seed":
        return seed_estimate(_count(arguments, "params"), _tokens(arguments) * BYTES_PER_TOKEN / 1e9)
    if arguments.rl_sequences is not None:
        estimated = estimate_rl(_rl_work(arguments), rates=rates_of_flags(arguments))
        if arguments.model_config is None:
            estimated = dataclasses.replace(estimated, notes=(*estimated.notes, _FULL_HEADS))
    else:
        check_amount("--save-s", arguments.save_s, _LONGEST_S)
        check_amount("--save-every-s", arguments.save_every_s, _LONGEST_S)
        model = _model_config(arguments)
        shape = None if model is None else model_shape(model)
        estimated = estimate(
            _workload(arguments, shape),
            shape=shape,
            rates=rates_of_flags(arguments),
            save_time_s=arguments.save_s,
            save_interval_s=arguments.save_every_s,
        )
    return estimated.assuming(gpu_given=arguments.gpu is not None)


def refuse_without_progress(found: Estimate, arguments: argparse.Namespace) -> None:
    """Refuse an estimate for a site that fails faster than the run makes progress.

    Raise UsageError with the flags.
    """
    lost = found.goodput
    if lost is not None and lost.goodput < _LEAST_GOODPUT:
        raise UsageError(
            f"an interruption every {format_duration(86400 / lost.interruptions_per_day)}, each with a "
            f"restart of {format_duration(arguments.restart_s)}, leaves no time for progress: give fewer "
            "--preemptions-per-day, more --gpu-hours-per-failure or a shorter --restart-s"
        )


def rates_of_flags(arguments: argparse.Namespace) -> FailureRates:
    return FailureRates(arguments.gpu_hours_per_failure, arguments.preemptions_per_day, arguments.restart_s)


def _workload(arguments: argparse.Namespace, shape: ModelShape | None) -> Workload:
    gpu = _gpu(arguments)
    known: dict[str, Any] = {
        **{name: getattr(arguments, name) for name in _AS_GIVEN},
        "tokens": _tokens(arguments),
        "gpu": gpu,
        "seq_len": 2048 if arguments.seq_len is None else arguments.seq_len,
        "tokens_per_step": _optional_count(arguments, "global_batch_tokens"),
        "precision": _precision(arguments.precision, gpu),
        "recompute": _recompute(arguments.recompute),
        "stack": arguments.stack,
    }
    if shape is not None:
        return Workload.of_shape(shape, **known)
    return Workload.of_counts(
        params=_count(arguments, "params"),
        active_params=_optional_count(arguments, "active_params"),
        layers=arguments.layers,
        hidden_size=arguments.hidden_size,
        **known,
    )


def _model_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    return None if arguments.model_config is None else read_config(arguments.model_config)


def _gpu(arguments: argparse.Namespace) -> Gpu:
    peak, memory, bandwidth = arguments.peak_tflops, arguments.gpu_memory_gib, arguments.gpu_bandwidth_tb_s
    check_amount("--peak-tflops", peak, _LARGEST_NUMBER)
    check_amount("--gpu-memory-gib", memory, _LARGEST_NUMBER)
    check_amount("--gpu-bandwidth-tb-s", bandwidth, _LARGEST_NUMBER)
    if peak is not None:  # all else like an A100
        return Gpu(arguments.gpu or "unnamed", peak, memory or 80.0, bandwidth or 2.0, has_fp8=True)
    known = find_gpu(arguments.gpu or ASSUMED_GPU)
    return dataclasses.replace(
        known, memory_gib=memory or known.memory_gib, bandwidth_tb_s=bandwidth or known.bandwidth_tb_s
    )


def _precision(given: str | None, gpu: Gpu) -> str:
    if given is None:
        return "bf16" if gpu.has_bf16 else "fp16"
    return _PRECISION_ALIASES.get(given.lower(), given.lower())


def _recompute(given: str | None) -> str | None:
    found = None if given is None else _RECOMPUTE_ALIASES.get(given, given)
    check_choice("--recompute", found, RECOMPUTATION)
    return found


def _tokens(arguments: argparse.Namespace) -> float:
    if arguments.tokens is not None:
        return _count(arguments, "tokens")
    if arguments.data_gb is None:
        raise UsageError("give --tokens, for example 1T, or --data-gb, the text in GB")
    check_amount("--data-gb", arguments.data_gb, _MOST_GB)
    return float(arguments.data_gb * 1e9 / BYTES_PER_TOKEN)


def _count(arguments: argparse.Namespace, name: str) -> float:
    given = getattr(arguments, name)
    flag = f"--{name.replace('_', '-')}"
    if given is None:
        raise UsageError(f"give {flag}, for example {flag} 7B")
    return parse_count(given, flag)


def _optional_count(arguments: argparse.Namespace, name: str) -> float | None:
    return None if getattr(arguments, name) is None else _count(arguments, name)


def _rl_work(arguments: argparse.Namespace) -> RlWork:
    if arguments.num_gpus is None:
        raise UsageError("reinforcement learning needs --num-gpus: how completions are batched depends on it")
    params, gpu, model = _count(arguments, "params"), _gpu(arguments), _model_config(arguments)
    check_amount("--rl-sequences", _count(arguments, "rl_sequences"), _MOST_SEQUENCES)
    sequences = max(1, round(_count(arguments, "rl_sequences")))
    each = min(arguments.sequences_per_rollout, sequences)
    longest = arguments.max_completion_length
    return RlWork(
        params=params,
        gpu=gpu,
        num_gpus=arguments.num_gpus,
        num_rollouts=max(1, round(sequences / max(1, each))),
        sequences_per_rollout=each,
        prompt_length=arguments.prompt_length,
        completion_length=arguments.completion_length,
        max_completion_length=4 * arguments.completion_length if longest is None else longest,
        cache_bytes_per_token=guessed_cache_bytes(params) if model is None else 2 * cache_values(model),
        active_params=_optional_count(arguments, "active_params"),
        precision=_precision(arguments.precision, gpu),
        logprob_passes=arguments.logprob_passes,
        critic_params=parse_count(arguments.critic_params, "--critic-params"),
        recompute=_recompute(arguments.recompute) == "full",
    )
