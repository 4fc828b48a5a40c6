"""Define the flags of the command `estimate`, and refuse those that a job file settles.

    add_flags(parser)
    refuse_settled(parser, arguments)

`--help` loads this module, so it imports little.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.cli import ArgumentParser
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.plan.hours.goodput import GPU_HOURS_PER_FAILURE, RESTART_S, SAVE_S
from r1hpc.plan.hours.workload import ASSUMED_GPU, PRECISIONS, RECOMPUTATION

METHODS = ("flops", "seed", "measured")


_FLAGS_ALONE = "leave the file out, or change the file"


SETTLED_BY_JOB = {
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
"""Flags whose value a job file sets, and the alternative."""


SETTLED_BY_RUN = dict.fromkeys(
    ("gpu", "num_gpus", "cluster", "gpu_hours_per_failure", "preemptions_per_day", "restart_s"),
    "the run's own measurements are used; leave it out, or take --method flops",
)
"""Flags that --method measured cannot use, and the alternative."""


SETTLED_BY_RL = {
    "tokens": "--rl-sequences sets the amount of training",
    "data_gb": "--rl-sequences sets the amount of training",
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
        "published runs do not show what a layout does to sampling and updates together; leave it out",
    ),
}
"""Flags that --rl-sequences sets or cannot use, and the alternative."""


_SETTLED_BY_MODEL_CONFIG = dict.fromkeys(
    ("params", "active_params", "layers", "hidden_size"), "the file says it; leave one of the two out"
)


_ONLY_OF_RL = dict.fromkeys(
    ("sequences_per_rollout", "prompt_length", "completion_length", "max_completion_length")
    + ("logprob_passes", "critic_params"),
    "give --rl-sequences N too, or leave it out",
)


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags in the groups shown by --help."""
    _add_model(parser.add_argument_group("model and data"))
    _add_hardware(parser.add_argument_group("hardware"))
    _add_layout(parser.add_argument_group("training, where known"))
    _add_losses(parser.add_argument_group("the site's own failure rates"))
    _add_rl(parser.add_argument_group("reinforcement learning, in place of --tokens"))


def refuse_settled(parser: ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags whose value is set elsewhere: they would be ignored silently.

    Raises:
        UsageError: names the alternative.
    """
    if arguments.target is not None:
        by = f"{printable(arguments.target)}, which settles it"
        _refuse(parser, arguments, SETTLED_BY_JOB, by)
        if arguments.method == "measured":
            _refuse(parser, arguments, SETTLED_BY_RUN, "--method measured")
            if arguments.overrides:
                word = printable(arguments.overrides[0])
                raise UsageError(f"--method measured is of a run as it is: leave {word} out")
    elif arguments.rl_sequences is not None:
        if arguments.method == "seed":
            raise UsageError("the article's formula knows no --rl-sequences: leave one of the two out")
        _refuse(parser, arguments, SETTLED_BY_RL, "--rl-sequences")
    else:
        _refuse(parser, arguments, _ONLY_OF_RL, "pretraining or tuning")
        if arguments.model_config is not None:
            _refuse(parser, arguments, _SETTLED_BY_MODEL_CONFIG, "--model-config")
        if arguments.tokens is not None and arguments.data_gb is not None:
            raise UsageError("--tokens and --data-gb both set the amount of training: leave one of them out")


def refuse_settled_by_chain(arguments: argparse.Namespace, job: Path) -> None:
    """Refuse the same for a chain, whose stages differ in what a flag can set only once.

    Raises:
        UsageError: names the alternative.
    """
    if arguments.method == "seed":
        raise UsageError(f"{job} is a chain, and the article's formula is for one run: leave --method out")
    if (arguments.gpu_hours_per_failure, arguments.preemptions_per_day, arguments.restart_s) != (
        GPU_HOURS_PER_FAILURE,
        0.0,
        RESTART_S,
    ):
        raise UsageError("failures, preemptions and restarts can be given for one run only, not for a chain")
    if arguments.num_gpus is not None:
        raise UsageError("a chain has a number of GPUs for each stage: give STAGE:resources.nodes=N instead")


def with_signs_joined(argv: Sequence[str]) -> list[str]:
    """Join `--params -7B` into `--params=-7B`: argparse takes -7B for a flag, hiding the wrong sign."""
    joined: list[str] = []
    for item in argv:
        if re.match(r"-[\d.]", item) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={item}"
        else:
            joined.append(item)
    return joined


def _refuse(
    parser: ArgumentParser, arguments: argparse.Namespace, settled: Mapping[str, str], by: str
) -> None:
    for name, instead in settled.items():
        if getattr(arguments, name) != parser.get_default(name):
            raise UsageError(f"--{name.replace('_', '-')} does not go with {by}: {instead}")


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
    group.add_argument("--gpu", metavar="NAME", help=f"a100-80gb, h100, ...; default {ASSUMED_GPU}")
    group.add_argument("--num-gpus", type=int, metavar="N")
    group.add_argument(
        "--peak-tflops", type=float, metavar="X", help="dense bf16, of a card not in the table"
    )
    group.add_argument("--gpu-memory-gib", type=float, metavar="X", help="its memory")
    group.add_argument("--gpu-bandwidth-tb-s", type=float, metavar="X", help="its memory bandwidth")


def _add_layout(group: Any) -> None:
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
    group.add_argument("--offload", action="store_true", help="the optimizer is in host memory")
    group.add_argument("--tensor-parallel", type=int, metavar="N")
    group.add_argument("--pipeline-parallel", type=int, metavar="N")


def _add_losses(group: Any) -> None:
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
