"""Advise on settings that are allowed but seldom meant: one sentence each, among a submission's notes.

notes = seldom_meant(config)
notes = other_form_in_chain(config, others)             # compared with the stage that trains its model
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.rl import RolloutConfig
from r1hpc.config.schema.run import SDPA, ModelConfig, Precision, RunConfig, TrainConfig, WandbConfig
from r1hpc.config.stages import SAMPLED_STAGES, TRAINED_STAGES

_LONG_TO_MASK = 8192
"""Row length in tokens from which full attention costs more than the linear layers, roughly."""
_HIGHEST_LR = 0.1
_LOW_FOR_ADAPTERS = {"sft": 5e-5, "rl": 1e-5}


def seldom_meant(config: RunConfig) -> list[str]:
    """Return notes worth reading before GPU-hours are spent."""
    return [
        *_rates(config),
        *_saves(config),
        *_slow(config),
        *_other_form(config),
        *_short_answers(config),
        *_without_effect(config),
    ]


def _without_effect(config: RunConfig) -> Iterator[str]:
    """Yield a note for each setting that has no effect without another one."""
    model, default = config.model, ModelConfig()
    of_lora = {"lora_alpha": model.lora_alpha != default.lora_alpha, "lora_targets": bool(model.lora_targets)}
    given = " and ".join(f"model.{key}" for key, is_given in of_lora.items() if is_given)
    if given and not model.lora_rank:
        yield f"{given} without model.lora_rank: no adapters, and all weights are trained"
    monitor = config.monitor
    if monitor.wandb != WandbConfig() and "wandb" not in monitor.trackers:
        yield "monitor.wandb is set and monitor.trackers does not name wandb: nothing is sent or kept for W&B"


def _rates(config: RunConfig) -> Iterator[str]:
    train, model = config.train, config.model
    if config.stage in TRAINED_STAGES and train.lr >= _HIGHEST_LR:
        yield (
            f"train.lr is {train.lr:g}: AdamW diverges at such a rate; pretraining takes 1e-4 to 1e-3, "
            "fine-tuning less"
        )
    if config.stage not in ("sft", "rl") or model.path is None or model.from_scratch:
        return
    if not model.lora_rank and train.lr == TrainConfig().lr:
        yield (
            f"train.lr is {train.lr:g}, the default, for pretraining: all weights of a pretrained model are "
            "trained with 1e-5 to 5e-5 in fine-tuning (include: [stage/sft]), 1e-6 in RL (include: [rl/r1])"
        )
    # Schulman et al., "LoRA Without Regret" (2025): ten times the best rate of all weights.
    if model.lora_rank and train.lr < _LOW_FOR_ADAPTERS[config.stage]:
        yield (
            f"train.lr is {train.lr:g}: adapters (model.lora_rank={model.lora_rank}) want some ten times the "
            "rate that is right for all weights, and hardly move with less"
        )


def _saves(config: RunConfig) -> Iterator[str]:
    train, every = config.train, config.checkpoint.save_every
    if config.stage == "rl" and config.resources.gpus_per_node != 0 and every >= train.num_steps:
        yield (
            f"checkpoint.save_every is {every:,} and the run has {train.num_steps:,} steps: a crash or a "
            "failing node loses all since the attempt began, or since the save at half its time limit; "
            "save about once an hour"
        )
    if config.stage in TRAINED_STAGES and train.warmup_steps > train.num_steps / 2:
        yield (
            f"train.warmup_steps is {train.warmup_steps:,} of train.num_steps={train.num_steps:,}: for most "
            f"of the run the rate is below train.lr={train.lr:g}"
        )


def _slow(config: RunConfig) -> Iterator[str]:
    """Yield notes on settings that cost more time or memory on a GPU than they save."""
    if config.resources.gpus_per_node == 0 or config.stage not in TRAINED_STAGES:
        return
    length, is_masked = config.data.seq_len, config.model.attn_implementation in SDPA
    if config.stage == "sft" and config.data.packing and is_masked and length >= _LONG_TO_MASK:
        yield (
            f"data.packing with data.seq_len={length:,}: sdpa computes all pairs of tokens in a row, and "
            "keeps a mask for each layer. With the package flash-attn, "
            "model.attn_implementation=flash_attention_2 computes only the pairs inside each document"
        )
    # pytorch/ao issue 685: a feed-forward of 4096 on an L20 in 43 ms by fp16, 49 by FP8, 26 by compiled FP8.
    if config.train.precision is Precision.fp8:
        yield (
            "train.precision=fp8 runs without torch.compile, whose fused kernels make it fast: it "
            "may be slower than bf16; use it to see how FP8 changes the loss"
        )


def _other_form(config: RunConfig) -> Iterator[str]:
    """Yield notes if the prompts differ from those of the run that trained the model, if that is there."""
    trained = _trained_by(config)
    if trained is not None:
        yield from put_otherwise(config, trained[0], trained[1].run_id)


def other_form_in_chain(config: RunConfig, others: Mapping[Path, RunConfig]) -> list[str]:
    """Return the same notes for a stage planned before the one that trains its model has begun.

    Args:
        others: the other stages of the chain, by their folders.
    """
    folder = Path(config.model.path or "")
    before = others.get(folder.parent)
    run = RunDir(folder.parent)
    is_answering = config.stage in SAMPLED_STAGES and folder.name == run.model.name
    if before is None or before.stage == "pretrain" or not is_answering or run.config.is_file():
        return []
    return list(put_otherwise(config, before, f"stage {run.run_id}"))


def put_otherwise(config: RunConfig, before: RunConfig, trained_by: str) -> Iterator[str]:
    """Yield notes if prompts differ from those of the run that trained the model, or answers end earlier."""
    ours: dict[str, tuple[Any, Any]] = {
        "model.system_prompt": (before.model.system_prompt, config.model.system_prompt),
        "model.open_thinking": (before.model.open_thinking, config.model.open_thinking),
        "model.chat_template=none": (
            before.model.chat_template == "none",
            config.model.chat_template == "none",
        ),
    }
    if before.stage in SAMPLED_STAGES:
        ours["reward.answer_in"] = (before.reward.answer_in, config.reward.answer_in)
        if before.task.name == config.task.name:
            templates = before.task.options.get("template"), config.task.options.get("template")
            ours["task.options.template"] = templates
        lengths = before.rollout.max_completion_length, config.rollout.max_completion_length
        if lengths[1] < lengths[0]:
            ours["rollout.max_completion_length"] = lengths
    for name, (theirs, mine) in ours.items():
        if theirs != mine:
            said = f"{name} is {mine!r:.60} here, and was {theirs!r:.60}"
            yield f"{said} in {trained_by}, which trained this model"


def _trained_by(config: RunConfig) -> tuple[RunConfig, RunDir] | None:
    """Return the r1hpc run that trained the model in use to answer; None if there is none."""
    folder = Path(config.model.path or "")
    run = RunDir(folder.parent)
    if config.stage not in SAMPLED_STAGES or folder.name != run.model.name or not run.config.is_file():
        return None
    try:
        before = load.read(run.config)
    except R1hpcError:  # another tool's folder
        return None
    return None if before.stage == "pretrain" else (before, run)


def _short_answers(config: RunConfig) -> Iterator[str]:
    """Yield a note if answers keep the default length, which fits the built-in sums."""
    longest = config.rollout.max_completion_length
    asks_files = config.evaluate.path or config.evaluate.sets or config.task.name in ("file", "jsonl")
    if config.stage in SAMPLED_STAGES and asks_files and longest == RolloutConfig().max_completion_length:
        yield f"answers are cut off at rollout.max_completion_length={longest} tokens, the default"
