"""Define the flags of the command `estimate`, and refuse those that a job file or another flag already sets.

`--help` loads this module, so it imports little.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1hpc.base.cli import ArgumentParser
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.plan.hours.goodput import GPU_HOURS_PER_FAILURE, RESTART_S, SAVE_S
from r1hpc.plan.hours.workload import ASSUMED_GPU, PRECISIONS, RECOMPUTATION, STACKS

METHODS = ("flops", "seed", "measured")

_Flags = dict[str, tuple[str, Any, Any, str | None]]
"""By name: metavar, type, default, help."""
_MODEL: _Flags = {
    "params": ("P", str, None, "parameters, for example 7B"),
    "active-params": ("P", str, None, "those one token meets, of a mixture of experts"),
    "tokens": ("T", str, None, "tokens trained on, all epochs together"),
    "data-gb": ("GB", float, None, "text in place of --tokens, 4 bytes a token"),
    "seq-len": ("N", int, None, "default 2048"),
    "layers": ("N", int, None, "with --hidden-size: exact attention FLOPs"),
    "hidden-size": ("N", int, None, None),
    "model-config": (
        "FILE",
        Path,
        None,
        "a config.json, in place of --params: exact FLOPs; for RL: the cache",
    ),
}
_CARD: _Flags = {
    "gpu": ("NAME", str, None, f"a100-80gb, h100, ...; default {ASSUMED_GPU}"),
    "num-gpus": ("N", int, None, None),
}
_UNLISTED_CARD: _Flags = {
    "peak-tflops": ("X", float, None, "dense bf16, of a card not in the table"),
    "gpu-memory-gib": ("X", float, None, "its memory"),
    "gpu-bandwidth-tb-s": ("X", float, None, "its memory bandwidth"),
}
_LAYOUT: _Flags = {
    "precision": ("NAME", str, None, f"{', '.join(PRECISIONS)}; default bf16"),
    "global-batch-tokens": ("T", str, None, "tokens of an optimizer step over all GPUs"),
    "micro-batch-size": ("N", float, None, "sequences a GPU and forward pass"),
    "zero-stage": ("N", int, None, None),
    "tensor-parallel": ("N", int, None, None),
    "pipeline-parallel": ("N", int, None, None),
    "stack": ("NAME", str, None, f"training software: {', '.join(STACKS)}"),
}
_RATES: _Flags = {
    "gpu-hours-per-failure": ("H", float, GPU_HOURS_PER_FAILURE, "default 50000"),
    "preemptions-per-day": ("N", float, 0.0, "of the whole job"),
    "restart-s": ("S", float, RESTART_S, "default 900"),
}
_SAVES: _Flags = {
    "save-s": ("S", float, SAVE_S, "one save; default 60"),
    "save-every-s": ("S", float, None, "between saves; default the best"),
}
_RL: _Flags = {
    "rl-sequences": ("N", str, None, "completions sampled and trained on, all together"),
    "sequences-per-rollout": ("N", int, 512, "default 512"),
    "prompt-length": ("N", float, 256, "default 256"),
    "completion-length": ("N", float, 1024, "mean; default 1024"),
    "max-completion-length": ("N", float, None, "default four times the mean"),
    "logprob-passes": ("N", int, 2, "default 2: old and reference"),
    "critic-params": ("P", str, "0", "PPO's critic; default none"),
}
_GROUPS: dict[str, _Flags] = {
    "model and data": _MODEL,
    "hardware": _CARD | _UNLISTED_CARD,
    "training, where known": _LAYOUT,
    "the site's own failure rates": _RATES | _SAVES,
    "reinforcement learning, in place of --tokens": _RL,
}
_IN_A_JOB_FILE = {
    "params": "model.path=DIR",
    "model-config": "model.path=DIR",
    "tokens": "train.num_steps=N",
    "global-batch-tokens": "train.global_batch_size=SEQUENCES",
    "micro-batch-size": "train.micro_batch_size=N",
    "seq-len": "data.seq_len=N",
    "precision": "train.precision=NAME",
    "recompute": "model.activation_checkpointing=true or false",
    "zero-stage": "deepspeed.zero_stage=N",
    "save-every-s": "checkpoint.save_every=STEPS",
    "prompt-length": "rollout.max_prompt_length=N",
    "max-completion-length": "rollout.max_completion_length=N",
}
"""The setting in place of a flag."""
_DESCRIBE_A_RUN = (*_MODEL, *_UNLISTED_CARD, *_LAYOUT, "recompute", "offload", *_SAVES, *_RL)
_NOT_OF_RL = (*("tokens", "data-gb", "seq-len", "layers", "hidden-size"), *_SAVES, "offload")
_NOT_OF_RL += tuple(name for name in _LAYOUT if name != "precision")


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags in the groups shown by --help."""
    for title, flags in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (metavar, kind, default, text) in flags.items():
            group.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=text)
        if flags is _LAYOUT:
            how = f"activation checkpointing: {', '.join(RECOMPUTATION)}; without HOW full"
            group.add_argument("--recompute", nargs="?", const="full", metavar="HOW", help=how)
            group.add_argument("--offload", action="store_true", help="the optimizer is in host memory")


def refuse_settled(parser: ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags whose value is set elsewhere: they would be ignored silently.

    Raise UsageError with the flag and the alternative.
    """
    if arguments.target is not None:
        _refuse(parser, arguments, _DESCRIBE_A_RUN, f"{printable(arguments.target)}, which settles it")
        if arguments.method == "measured":
            _refuse(parser, arguments, (*_CARD, "cluster", *_RATES), "--method measured")
            if arguments.overrides:
                word = printable(arguments.overrides[0])
                raise UsageError(f"--method measured is of a run as it is: leave {word} out")
    elif arguments.rl_sequences is not None:
        if arguments.method == "seed":
            raise UsageError("the article's formula knows no --rl-sequences: leave one of the two out")
        _refuse(parser, arguments, _NOT_OF_RL, "--rl-sequences")
    else:
        instead = "leave it out, or give --rl-sequences N too"
        _refuse(parser, arguments, _RL, "pretraining or tuning", instead)
        if arguments.model_config is not None:
            _refuse(parser, arguments, ("params", "active-params", "layers", "hidden-size"), "--model-config")
        if arguments.tokens is not None and arguments.data_gb is not None:
            raise UsageError("--tokens and --data-gb both set the amount of training: leave one of them out")


def refuse_settled_by_chain(parser: ArgumentParser, arguments: argparse.Namespace, job: Path) -> None:
    """Refuse the same for a chain, whose stages differ in what a flag can set only once.

    Raise UsageError with the flag and the alternative.
    """
    if arguments.method == "seed":
        raise UsageError(f"{job} is a chain, and the article's formula is for one run: leave --method out")
    _refuse(parser, arguments, _RATES, f"the chain {job}")
    if arguments.num_gpus is not None:
        raise UsageError("a chain has a number of GPUs for each stage: give STAGE:resources.nodes=N instead")


def _refuse(
    parser: ArgumentParser,
    arguments: argparse.Namespace,
    flags: Iterable[str],
    by: str,
    instead: str = "leave it out",
) -> None:
    for name in flags:
        key = name.replace("-", "_")
        if getattr(arguments, key) != parser.get_default(key):
            setting = _IN_A_JOB_FILE.get(name) if arguments.target is not None else None
            way = f"give {setting}" if setting else instead
            raise UsageError(f"--{name} does not go with {by}: {way}")
