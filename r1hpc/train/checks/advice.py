"""Settings that are allowed and seldom meant: a sentence for each, among the notes of a submission.

notes = seldom_meant(config)
notes = other_form_in_chain(config, others)             # than in the stage that trains its model
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
"""Tokens of a row from which on attention over all of them costs more than the linear layers, roughly."""
_HIGHEST_LR = 0.1
_LOW_FOR_ADAPTERS = {"sft": 5e-5, "rl": 1e-5}


def seldom_meant(config: RunConfig) -> list[str]:
    """What a person would want to be told before the hours are spent."""
    return [
        *_rates(config),
        *_saves(config),
        *_slow(config),
        *_other_form(config),
        *_short_answers(config),
        *_without_effect(config),
    ]


def _without_effect(config: RunConfig) -> Iterator[str]:
    """What was set, and is not asked for without another setting."""
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
            "failing node loses all since the attempt began, or since the save at half of its time limit; "
            "set it to what takes about an hour"
        )
    if config.stage in TRAINED_STAGES and train.warmup_steps > train.num_steps / 2:
        yield (
            f"train.warmup_steps is {train.warmup_steps:,} of train.num_steps={train.num_steps:,}: for most "
            f"of the run the rate is below train.lr={train.lr:g}"
        )


def _slow(config: RunConfig) -> Iterator[str]:
    """What takes more time or memory on a GPU than it saves."""
    if config.resources.gpus_per_node == 0 or config.stage not in TRAINED_STAGES:
        return
    length, is_masked = config.data.seq_len, config.model.attn_implementation in SDPA
    if config.stage == "sft" and config.data.packing and is_masked and length >= _LONG_TO_MASK:
        yield (
            f"data.packing with data.seq_len={length:,}: sdpa works out all pairs of tokens of a row, and "
            "keeps a mask of them for each layer; with the package flash-attn, "
            "model.attn_implementation=flash_attention_2 attends inside the documents alone"
        )
    # pytorch/ao issue 685: a feed-forward of 4096 on an L20 in 43 ms by fp16, 49 by FP8, 26 by compiled FP8.
    if config.train.precision is Precision.fp8:
        yield (
            "train.precision=fp8 runs without torch.compile, whose fused kernels are what makes it fast: it "
            "may well take longer than bf16, and is for looking at what FP8 does to the loss"
        )


def _other_form(config: RunConfig) -> Iterator[str]:
    """Prompts that are put otherwise than in the run that trained the model, where that is there."""
    trained = _trained_by(config)
    if trained is not None:
        yield from put_otherwise(config, trained[0], trained[1].run_id)


def other_form_in_chain(config: RunConfig, others: Mapping[Path, RunConfig]) -> list[str]:
    """The same, of a stage that is planned before the one that trains its model has begun.

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
    """Where questions are put otherwise than in the run that trained the model, or answers end earlier."""
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
    """The run whose model is asked, where it is one of ours that learnt to answer."""
    folder = Path(config.model.path or "")
    run = RunDir(folder.parent)
    if config.stage not in SAMPLED_STAGES or folder.name != run.model.name or not run.config.is_file():
        return None
    try:
        before = load.read(run.config)
    except R1hpcError:  # a folder of somebody else's
        return None
    return None if before.stage == "pretrain" else (before, run)


def _short_answers(config: RunConfig) -> Iterator[str]:
    """The default is that of the built-in sums."""
    longest = config.rollout.max_completion_length
    asks_files = config.evaluate.path or config.evaluate.sets or config.task.name in ("file", "jsonl")
    if config.stage in SAMPLED_STAGES and asks_files and longest == RolloutConfig().max_completion_length:
        yield f"answers are cut off at rollout.max_completion_length={longest} tokens, the default"
