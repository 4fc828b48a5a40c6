"""GPU-hours before they are spent.

    python -m r1hpc.estimate --params 7B --tokens 1T --gpu a100-80gb --num-gpus 256
    python -m r1hpc.estimate jobs/train.yaml --gpu h100 train.num_steps=20000
    python -m r1hpc.estimate jobs/r1.yaml                                # a chain: each stage, and the sum
    python -m r1hpc.estimate --params 7B --data-gb 100 --method seed     # the article's formula
    python -m r1hpc.estimate RUN_DIR --method measured                   # from the steps a run has taken

P10, P50 and P90 of what will be billed, what was assumed, where the width comes from, the save interval that
loses least, and which configurations fit the card. Whole numbers may be written 7B, 350M, 1.5e9.
How good it is: docs/estimator.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.rundir import default_run_root
from r1hpc.base.units import format_duration

if TYPE_CHECKING:  # at run time what only an answer needs is imported for it: --help must be quick
    from r1hpc.estimator.estimate import Estimate
    from r1hpc.estimator.goodput import FailureRates
    from r1hpc.estimator.rl_phase import RlWork
    from r1hpc.estimator.workload import Workload
    from r1hpc.plan.hardware import Gpu
    from r1hpc.plan.shape import ModelShape

_DEFAULT_GPU = "A100-SXM4-80GB"
_ASSUMED_GPUS_PER_NODE = 8
_ASSUMED_BANDWIDTH_TB_S = 2.0
_PRECISION_ALIASES = {
    "bfloat16": "bf16",
    "amp_bf16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "amp_fp16": "fp16",
    "amp_fp8": "fp8",
    "float32": "fp32",
}
_FLAGS_ALONE = "leave the file out, or change the file"
_SETTLED_BY_JOB = {
    "params": "leave the file out, or give model.path=DIR",
    "model_config": "leave the file out, or give model.path=DIR",
    "tokens": "give train.num_steps=N",
    "global_batch_tokens": "give train.global_batch_size=SEQUENCES",
    "micro_batch_size": "give train.micro_batch_size=N",
    "seq_len": "give data.seq_len=N",
    "precision": "give train.precision=NAME",
    "recompute": "give model.activation_checkpointing=true or false",
    "zero_stage": "give deepspeed.zero_stage=N",
    "save_every_s": "give checkpoint.save_every=STEPS",
    "prompt_length": "give rollout.max_prompt_length=N",
    "max_completion_length": "give rollout.max_completion_length=N",
    **dict.fromkeys(
        (
            "active_params",
            "data_gb",
            "layers",
            "hidden_size",
            "peak_tflops",
            "gpu_memory_gib",
            "gpu_bandwidth_tb_s",
            "offload",
            "tensor_parallel",
            "pipeline_parallel",
            "save_s",
            "rl_sequences",
            "sequences_per_rollout",
            "completion_length",
            "logprob_passes",
            "critic_params",
        ),
        _FLAGS_ALONE,
    ),
}
"""Flags that a job file leaves no room for, and what to do instead."""
_SETTLED_BY_RL = {
    "tokens": "--rl-sequences says how much is trained on",
    "data_gb": "--rl-sequences says how much is trained on",
    "model_config": "give --params, and --active-params of a mixture of experts",
    "seq_len": "give --prompt-length and --max-completion-length",
    "global_batch_tokens": "give --sequences-per-rollout",
    "save_s": "saves are taken as the best interval has them; leave it out",
    "save_every_s": "saves are taken as the best interval has them; leave it out",
    **dict.fromkeys(
        ("layers", "hidden_size"), "the cache follows from --params; leave it out, or give a job file"
    ),
    **dict.fromkeys(
        ("micro_batch_size", "zero_stage", "offload", "tensor_parallel", "pipeline_parallel"),
        "published runs do not tell what a layout does to sampling and updates together; leave it out",
    ),
}
"""Flags that --rl-sequences leaves no room for, and what to do instead."""
_LEAST_GOODPUT = 0.01
_RECOMPUTE_ALIASES = {"yes": "full", "true": "full", "no": "none", "false": "none"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _read(argv)
    from r1hpc.estimator.estimate_text import estimate_text

    if arguments.method != "measured" and (chain := _chain_file(arguments)):
        return _print_chain(chain, arguments)
    found, correction = _corrected(_answer(arguments), arguments)
    if arguments.json:
        print_json({**found.to_json(), **correction})
    else:
        print(estimate_text(found))
    return 0


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(_negative_values(argv))
    if unknown:
        parser.parse_args(unknown)  # names the nearest known flag
    arguments.overrides = [word for word in arguments.words if "=" in word]
    files = [word for word in arguments.words if "=" not in word]
    if len(files) > 1:
        raise UsageError(f"two files, {printable(files[0])} and {printable(files[1])}: give one")
    arguments.target = files[0] if files else None
    if arguments.target is not None:
        by = f"{printable(arguments.target)}, which settles it"
        _refuse_settled(parser, arguments, _SETTLED_BY_JOB, by)
    elif arguments.rl_sequences is not None:
        if arguments.method == "seed":
            raise UsageError("the article's formula knows no --rl-sequences: leave one of the two out")
        _refuse_settled(parser, arguments, _SETTLED_BY_RL, "--rl-sequences")
    return arguments


def _refuse_settled(
    parser: ArgumentParser, arguments: argparse.Namespace, settled: Mapping[str, str], by: str
) -> None:
    """A flag that says what something else says would be passed over in silence."""
    for name, instead in settled.items():
        if getattr(arguments, name) != parser.get_default(name):
            raise UsageError(f"--{name.replace('_', '-')} does not go with {by}: {instead}")


def _negative_values(argv: Sequence[str] | None) -> list[str]:
    """`--params -7B` as `--params=-7B`: argparse takes -7B for a flag; the answer shall be about the sign."""
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if re.match(r"-[\d.]", word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _parser() -> ArgumentParser:
    from r1hpc.estimator.estimate import METHODS

    parser = ArgumentParser(prog="python -m r1hpc.estimate", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="JOB.yaml | KEY=VALUE", help="a job file, or flags alone")
    parser.add_argument("--method", choices=METHODS, default="flops", help="default: flops")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--run-root", metavar="DIR", help="where runs lie; default $R1HPC_RUN_ROOT or ./runs")
    parser.add_argument(
        "--cluster", metavar="NAME", help="profile in configs/cluster/; default $R1HPC_CLUSTER"
    )
    _add_model(parser.add_argument_group("model and data"))
    _add_hardware(parser.add_argument_group("hardware"))
    _add_layout(parser.add_argument_group("training, where known"))
    _add_losses(parser.add_argument_group("what goes wrong, by the site's own records"))
    _add_rl(parser.add_argument_group("reinforcement learning, in place of --tokens"))
    return parser


def _add_model(group: Any) -> None:
    group.add_argument("--params", metavar="P", help="parameters, for example 7B")
    group.add_argument("--active-params", metavar="P", help="those one token meets, of a mixture of experts")
    group.add_argument("--tokens", metavar="T", help="tokens trained on, all epochs together")
    group.add_argument(
        "--data-gb", type=float, metavar="GB", help="text in place of --tokens, 4 bytes a token"
    )
    group.add_argument("--seq-len", type=int, metavar="N", help="default 2048")
    group.add_argument("--layers", type=int, metavar="N", help="with --hidden-size: exact attention FLOPs")
    group.add_argument("--hidden-size", type=int, metavar="N")
    group.add_argument(
        "--model-config", type=Path, metavar="FILE", help="a config.json, in place of --params: exact FLOPs"
    )


def _add_hardware(group: Any) -> None:
    group.add_argument("--gpu", metavar="NAME", help=f"a100-80gb, h100, ...; default {_DEFAULT_GPU}")
    group.add_argument("--num-gpus", type=int, metavar="N")
    group.add_argument(
        "--peak-tflops", type=float, metavar="X", help="dense bf16, of a card not in the table"
    )
    group.add_argument("--gpu-memory-gib", type=float, metavar="X", help="its memory")
    group.add_argument("--gpu-bandwidth-tb-s", type=float, metavar="X", help="its memory bandwidth")


def _add_layout(group: Any) -> None:
    from r1hpc.estimator.workload import PRECISIONS, RECOMPUTATION

    group.add_argument("--precision", metavar="NAME", help=f"{', '.join(PRECISIONS)}; default bf16")
    group.add_argument("--global-batch-tokens", metavar="T", help="tokens of an optimizer step over all GPUs")
    group.add_argument("--micro-batch-size", type=float, metavar="N", help="sequences a GPU and forward pass")
    group.add_argument(
        "--recompute",
        nargs="?",
        const="full",
        metavar="HOW",
        help=f"activation checkpointing: {', '.join(RECOMPUTATION)}; without HOW full",
    )
    group.add_argument("--zero-stage", type=int, metavar="N")
    group.add_argument("--offload", action="store_true", help="the optimizer lies in the host's memory")
    group.add_argument("--tensor-parallel", type=int, metavar="N")
    group.add_argument("--pipeline-parallel", type=int, metavar="N")


def _add_losses(group: Any) -> None:
    from r1hpc.estimator.goodput import GPU_HOURS_PER_FAILURE, RESTART_S, SAVE_S

    group.add_argument(
        "--gpu-hours-per-failure",
        type=float,
        default=GPU_HOURS_PER_FAILURE,
        metavar="H",
        help="default 50000",
    )
    group.add_argument("--preemptions-per-day", type=float, default=0.0, metavar="N", help="of the whole job")
    group.add_argument("--restart-s", type=float, default=RESTART_S, metavar="S", help="default 900")
    group.add_argument("--save-s", type=float, default=SAVE_S, metavar="S", help="one save; default 60")
    group.add_argument("--save-every-s", type=float, metavar="S", help="between saves; default the best")


def _add_rl(group: Any) -> None:
    group.add_argument("--rl-sequences", metavar="N", help="completions sampled and trained on, all together")
    group.add_argument("--sequences-per-rollout", type=int, default=512, metavar="N", help="default 512")
    group.add_argument("--prompt-length", type=float, default=256, metavar="N", help="default 256")
    group.add_argument(
        "--completion-length", type=float, default=1024, metavar="N", help="mean; default 1024"
    )
    group.add_argument("--max-completion-length", type=float, metavar="N", help="default four times the mean")
    group.add_argument(
        "--logprob-passes", type=int, default=2, metavar="N", help="default 2: old and reference"
    )
    group.add_argument("--critic-params", default="0", metavar="P", help="PPO's critic; default none")


def _chain_file(arguments: argparse.Namespace) -> Path | None:
    """The job file, where it is one of a chain."""
    if arguments.target is None:
        return None
    from r1hpc.config.load import find_job
    from r1hpc.submission.chain_file import is_chain_file

    job = find_job(arguments.target)
    return job if is_chain_file(job) else None


def _print_chain(job: Path, arguments: argparse.Namespace) -> int:
    from r1hpc.estimator.goodput import FailureRates
    from r1hpc.plan.hardware import find_gpu
    from r1hpc.submission.chain_estimate import estimate_chain
    from r1hpc.submission.order import Order, Purpose

    if arguments.method == "seed":
        raise UsageError(f"{job} is a chain, and the article's formula is for one run: leave --method out")
    if _rates(arguments) != FailureRates():
        raise UsageError("failures, preemptions and restarts can be told for one run only, not for a chain")
    if arguments.num_gpus is not None:
        raise UsageError("a chain has a number of GPUs for each stage: give STAGE:resources.nodes=N instead")
    told = [f"cluster.gpu_type={find_gpu(arguments.gpu).name}"] if arguments.gpu else []
    root = Path(arguments.run_root) if arguments.run_root else default_run_root()
    order = Order(
        Purpose.dry_run,
        "slurm",
        overrides=(*arguments.overrides, *told),
        cluster=arguments.cluster,
        run_root=root,
    )
    found = estimate_chain(job, order)
    if arguments.json:
        print_json(found.to_json())
    else:
        print(found.text())
    return 0


def _answer(arguments: argparse.Namespace) -> Estimate:
    found = _estimated(arguments)
    lost = found.goodput
    if lost is not None and lost.goodput < _LEAST_GOODPUT:
        raise UsageError(
            f"an interruption every {format_duration(86400 / lost.interruptions_per_day)}, each with a "
            f"restart of {format_duration(arguments.restart_s)}, leaves no time for progress: give fewer "
            "--preemptions-per-day, more --gpu-hours-per-failure or a shorter --restart-s"
        )
    return found


def _estimated(arguments: argparse.Namespace) -> Estimate:
    from r1hpc.estimator.estimate import estimate, seed_estimate, with_card
    from r1hpc.estimator.estimate_run import estimate_rl
    from r1hpc.estimator.goodput import SAVE_S

    if arguments.method == "measured":
        return _of_measured_run(arguments)
    if arguments.target is not None:
        return _of_job(arguments)
    if arguments.overrides:
        raise UsageError(f"{printable(arguments.overrides[0])} changes a job file, and none is given")
    if arguments.params is None and arguments.model_config is None:
        raise UsageError(
            "what shall be estimated? Give a job file, or --params 7B --tokens 1T, with --gpu a100-80gb and "
            "--num-gpus 64 where they are known"
        )
    if arguments.method == "seed":
        return seed_estimate(_count(arguments, "params"), _gigabytes(arguments))
    if arguments.rl_sequences is not None:
        found = estimate_rl(_rl_work(arguments), rates=_rates(arguments))
    else:
        shape = _shape(arguments)
        found = estimate(
            _workload(arguments, shape),
            shape=shape,
            rates=_rates(arguments),
            save_time_s=_positive("--save-s", arguments.save_s) or SAVE_S,
            save_interval_s=_positive("--save-every-s", arguments.save_every_s),
        )
    return with_card(found, arguments.gpu is not None)


def _rates(arguments: argparse.Namespace) -> FailureRates:
    from r1hpc.estimator.goodput import FailureRates

    return FailureRates(arguments.gpu_hours_per_failure, arguments.preemptions_per_day, arguments.restart_s)


def _corrected(found: Estimate, arguments: argparse.Namespace) -> tuple[Estimate, dict[str, Any]]:
    """With what this site's own finished runs say of such estimates; unchanged where there are none."""
    from r1hpc.estimator.estimate import Quantiles
    from r1hpc.estimator.estimate_text import hours_words

    root = Path(arguments.run_root) if arguments.run_root else default_run_root()
    if found.method != "flops" or not root.is_dir():
        return found, {}
    # Deferred: a machine without runs need not know how runs are accounted.
    from r1hpc.accounting.calibrate import site_correction
    from r1hpc.accounting.correction import CPU
    from r1hpc.accounting.forecast import Spread

    key = "node_hours" if found.gpu_hours is None else "gpu_hours"
    hours = getattr(found, key)
    site = site_correction(root.absolute(), str(found.assumptions.get("gpu") or CPU))
    if hours is None or not site.num_runs:
        return found, {}
    spread = site.apply(Spread(hours.p10, hours.p50, hours.p90))
    corrected = Quantiles(spread.p10, spread.p50, spread.p90)
    note = f"corrected by this site's runs: {site.basis}; before that {hours_words(hours)}"
    wall = {n: corrected * (each.p50 / hours.p50) for n, each in found.wall_hours.items()}
    changed: dict[str, Any] = {key: corrected, "wall_hours": wall, "notes": (note, *found.notes)}
    return replace(found, **changed), {"uncorrected": {key: hours.to_json()}, "correction": site.to_json()}


def _workload(arguments: argparse.Namespace, shape: ModelShape | None) -> Workload:
    from r1hpc.estimator.workload import Workload

    gpu = _gpu(arguments)
    known: dict[str, Any] = {
        "tokens": _tokens(arguments),
        "gpu": gpu,
        "num_gpus": arguments.num_gpus,
        "seq_len": 2048 if arguments.seq_len is None else arguments.seq_len,
        "tokens_per_step": _optional_count(arguments, "global_batch_tokens"),
        "micro_batch_size": arguments.micro_batch_size,
        "precision": _precision(arguments.precision, gpu),
        "recompute": _recompute(arguments.recompute),
        "zero_stage": arguments.zero_stage,
        "offload": arguments.offload,
        "tensor_parallel": arguments.tensor_parallel,
        "pipeline_parallel": arguments.pipeline_parallel,
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


def _shape(arguments: argparse.Namespace) -> ModelShape | None:
    from r1hpc.plan.shape import model_shape

    path = arguments.model_config
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold one JSON object: a model's config.json")
    return model_shape(content)


def _gpu(arguments: argparse.Namespace) -> Gpu:
    """The card of the table, or one told by its numbers."""
    from r1hpc.plan.hardware import Gpu, find_gpu

    if arguments.peak_tflops is None:
        return find_gpu(arguments.gpu or _DEFAULT_GPU)
    for flag in ("peak_tflops", "gpu_memory_gib", "gpu_bandwidth_tb_s"):
        _positive(f"--{flag.replace('_', '-')}", getattr(arguments, flag))
    return Gpu(
        arguments.gpu or "unnamed",
        arguments.peak_tflops,
        arguments.gpu_memory_gib or 80.0,
        arguments.gpu_bandwidth_tb_s or _ASSUMED_BANDWIDTH_TB_S,
        has_fp8=True,
    )


def _precision(given: str | None, gpu: Gpu) -> str:
    if given is None:
        return "bf16" if gpu.has_bf16 else "fp16"
    return _PRECISION_ALIASES.get(given.lower(), given.lower())


def _recompute(given: str | None) -> str | None:
    from r1hpc.estimator.workload import RECOMPUTATION, check_choice

    found = None if given is None else _RECOMPUTE_ALIASES.get(given, given)
    check_choice("--recompute", found, RECOMPUTATION)
    return found


def _tokens(arguments: argparse.Namespace) -> float:
    if arguments.tokens is not None:
        return _count(arguments, "tokens")
    if arguments.data_gb is None:
        raise UsageError("give --tokens, for example 1T, or --data-gb, the text in GB")
    return _gigabytes(arguments) * 1e9 / 4


def _gigabytes(arguments: argparse.Namespace) -> float:
    if arguments.data_gb is not None:
        return _positive("--data-gb", arguments.data_gb) or 0.0
    return 4 * _tokens(arguments) / 1e9


def _count(arguments: argparse.Namespace, name: str) -> float:
    from r1hpc.estimator.workload import parse_count

    given = getattr(arguments, name)
    flag = f"--{name.replace('_', '-')}"
    if given is None:
        raise UsageError(f"give {flag}, for example {flag} 7B")
    value = parse_count(given, flag)
    return _positive(flag, value) or 0.0


def _optional_count(arguments: argparse.Namespace, name: str) -> float | None:
    return None if getattr(arguments, name) is None else _count(arguments, name)


def _positive(flag: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"{flag} is {value:g}: it must be above 0")
    return value


def _rl_work(arguments: argparse.Namespace) -> RlWork:
    from r1hpc.estimator.estimate_run import guessed_cache_bytes
    from r1hpc.estimator.rl_phase import RlWork
    from r1hpc.estimator.workload import parse_count

    if arguments.num_gpus is None:
        raise UsageError("reinforcement learning needs --num-gpus: how completions are batched depends on it")
    params, gpu = _count(arguments, "params"), _gpu(arguments)
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
        cache_bytes_per_token=guessed_cache_bytes(params, gpu),
        active_params=_optional_count(arguments, "active_params"),
        precision=_precision(arguments.precision, gpu),
        logprob_passes=arguments.logprob_passes,
        critic_params=parse_count(arguments.critic_params, "--critic-params"),
        recompute=_recompute(arguments.recompute) == "full",
    )


def _of_job(arguments: argparse.Namespace) -> Estimate:
    """As submit would see it, on the asked number of GPUs."""
    from r1hpc.config import load
    from r1hpc.data.preview import preview_vocab_size
    from r1hpc.estimator.estimate import seed_estimate
    from r1hpc.estimator.estimate_run import estimate_of_run
    from r1hpc.plan.hardware import find_gpu
    from r1hpc.plan.run import make_plan

    config = load.load(arguments.target, arguments.overrides, arguments.cluster)
    if arguments.gpu is not None:
        config = replace(config, cluster=replace(config.cluster, gpu_type=find_gpu(arguments.gpu).name))
    asked = config.resources.gpus_per_node
    per_node = config.cluster.gpus_per_node if asked is None else asked
    per_node = _ASSUMED_GPUS_PER_NODE if per_node is None else per_node
    nodes = config.resources.nodes
    if arguments.num_gpus is not None and per_node:
        per_node, nodes = _spread(arguments.num_gpus, per_node)
    plan = make_plan(
        config,
        gpus_per_node=per_node,
        num_nodes=nodes,
        vocab_size=preview_vocab_size(config.data.path, config.data.recipe),
        time_limit_s=_time_limit(config.resources.time),
    )
    found = estimate_of_run(config, plan, _rates(arguments))
    if found is None:
        raise UsageError(
            f"{printable(arguments.target)}: the model's parameters are not known before it is built; give "
            "--params and --tokens in its place"
        )
    if arguments.method == "seed":
        return seed_estimate(float(plan.num_parameters or 0), 4 * plan.total_tokens / 1e9)
    return found


def _time_limit(text: str | None) -> int | None:
    from r1hpc.base.units import parse_time

    return None if text is None else parse_time(text)


def _spread(num_gpus: int, per_node: int) -> tuple[int, int]:
    """(GPUs per node, nodes) that make num_gpus."""
    if num_gpus < 1:
        raise UsageError(f"--num-gpus is {num_gpus}: it must be at least 1")
    if num_gpus <= per_node:
        return num_gpus, 1
    if num_gpus % per_node:
        raise UsageError(f"--num-gpus {num_gpus} is not a multiple of the {per_node} GPUs of a node")
    return per_node, num_gpus // per_node


def _of_measured_run(arguments: argparse.Namespace) -> Estimate:
    import time

    from r1hpc.accounting.measured_run import measured_run
    from r1hpc.base.rundir import open_run

    if arguments.target is None:
        raise UsageError("--method measured needs a run: python -m r1hpc.estimate RUN_DIR --method measured")
    return measured_run(open_run(arguments.target), time.time())


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
