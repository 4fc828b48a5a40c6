"""Check a run's models before it is queued, and advise on settings that are allowed but seldom meant.

    notes = check_models(config, expected_model=None, expected_teacher=None)      # of a new run
    notes = seldom_meant(config)

Files that an earlier stage of a chain has yet to write are checked by the ranks.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError, R1hpcError, UsageError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.rl import RolloutConfig
from r1hpc.config.schema.run import ModelConfig, RunConfig, TrainConfig, WandbConfig
from r1hpc.config.schema.sections import zero_converts
from r1hpc.config.stages import samples, trains
from r1hpc.plan.model.families import ALIASES, FAMILIES
from r1hpc.plan.model.shape import SHAPE_NAMES, dropouts, load_model_config, load_teacher_config, teacher_of
from r1hpc.plan.model.weights import check_headers, check_tensors, check_weights
from r1hpc.plan.topology.checks import check_base_shape, is_quantized, rope_types

_NOT_BY_VLLM = ("mixtral", "gemma2")
"""Families vLLM 0.32 cannot take: it has transformers' former names of Mixtral's experts, and no output head
of Gemma 2's (read in its sources, not run)."""
_SLIP = 0.9
"""Similarity of two names from which one is likely a typo: a letter left out, or two exchanged."""
_HEADS = ("lm_head", "embed_out")
_COLDEST_OF_VLLM = 0.01
"""vLLM 0.32 raises lower temperatures to this one."""

_LOW_FOR_ADAPTERS = {"sft": 5e-5, "rl": 1e-5}


def check_models(
    config: RunConfig, expected_model: Mapping[str, Any] | None, expected_teacher: Mapping[str, Any] | None
) -> list[str]:
    """Refuse a model or a teacher that cannot be loaded as the run wants it; return notes.

    `expected_model` is the config.json that an earlier stage will leave in model.path, `expected_teacher`
    that of rl.teacher.
    """
    tokenizer_to_come = tokenizer_is_to_come(config, expected_model)
    if config.stage != "traces":  # demonstrations are computed: no model is loaded
        _check_weights(config, expected_model)
    if config.model.lora_targets:
        _refuse_adapted_head(config)
    notes = _slips(config.model.config)
    if config.rl.teacher:
        _check_teacher(config, expected_teacher, tokenizer_to_come=tokenizer_to_come)
        notes += [] if tokenizer_to_come else _other_end(config)
    return notes


def _slips(given: Mapping[str, Any]) -> list[str]:
    """Return a note on each key of model.config that looks like a typo of one the shape follows from. Hugging
    Face keeps keys that it does not know: `num_hidden_layer: 48` would be a model of the usual depth."""
    family = FAMILIES.get(str(given.get("model_type")))
    known = {*SHAPE_NAMES, *(family.defaults if family else ())}
    known |= {name for aliases in ALIASES.values() for name in aliases}
    notes = []
    for key in given.keys() - known:
        if near := difflib.get_close_matches(key, known, 1, _SLIP):
            notes.append(f"model.config.{printable(key)} changes no shape: did you mean {near[0]}?")
    return notes


def _check_weights(config: RunConfig, expected_model: Mapping[str, Any] | None) -> None:
    """Refuse a model.path without weights that fit, unless an earlier stage has yet to write them."""
    model = config.model
    is_to_come = expected_model is not None and not Path(model.path or "", "config.json").is_file()
    # Raises first if there is no folder.
    hf_config = load_model_config(config, None, expected_model if is_to_come else None)
    if samples(config.stage) and config.rollout.engine == "vllm":
        refuse_for_vllm(config, hf_config)
    elif samples(config.stage):
        _refuse_two_rotations(config, hf_config)
    has_one_policy = config.stage == "rl" and config.rollout.max_logprob_difference is None
    if has_one_policy and (drops := dropouts(hf_config)):
        raise ConfigError(
            f"the model's config.json has dropout ({', '.join(drops)}); in RL the trainer runs the sampler's "
            "policy, which has none: add " + " ".join(f"model.config.{key}=0" for key in drops)
        )
    if not is_to_come and model.path is not None and not model.from_scratch:
        check_weights(model)
        _refuse_integers(config, hf_config)
        check_tensors(model, hf_config)
        check_headers(Path(model.path), hf_config)
        if is_quantized(config):
            check_base_shape(config, hf_config)


def _refuse_adapted_head(config: RunConfig) -> None:
    """Refuse adapters on the output head under ZeRO 3. Each call of an adapter gathers its weights, once per
    chunk of logits; ranks have unequal numbers of chunks and would wait for one another."""
    named = [target for target in config.model.lora_targets if target.split(".")[-1] in _HEADS]
    is_divided = trains(config.stage) and config.deepspeed.zero_stage == 3
    if named and config.model.lora_rank and is_divided and config.train.logits_chunk_tokens != 0:
        raise ConfigError(
            f"model.lora_targets names the output head ({named[0]}), which is not adapted under "
            "deepspeed.zero_stage=3 where logits come in chunks: leave it out, or take zero_stage=2 or "
            "train.logits_chunk_tokens=0"
        )


def refuse_for_vllm(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Refuse families whose weight names vLLM lacks (weight_sync.py), and temperatures it would raise."""
    evaluate = config.evaluate.temperature
    asked = {}
    if config.stage != "evaluate" or not evaluate:
        asked["rollout.temperature"] = config.rollout.temperature
    if config.stage != "generate" and evaluate:
        asked["evaluate.temperature"] = evaluate
    for key, temperature in asked.items():
        if temperature < _COLDEST_OF_VLLM:
            raise ConfigError(f"{key} is {temperature:g}: vLLM samples at {_COLDEST_OF_VLLM} at least")
    family = hf_config.get("model_type")
    if family in _NOT_BY_VLLM:
        raise ConfigError(
            f"rollout.engine=vllm does not support type {family}, whose weights have other names there: "
            "take rollout.engine=sampler"
        )


def _refuse_two_rotations(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Refuse rows beyond the original context with longrope (Phi-3). There the frequencies of all positions
    change, but a cache was rotated by the old ones; transformers' own generate rebuilds it."""
    if "longrope" not in rope_types(hf_config):
        return
    nested = [value for value in hf_config.values() if isinstance(value, Mapping)]
    key = "original_max_position_embeddings"
    original = next((values[key] for values in (hf_config, *nested) if key in values), None)
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    if original is not None and longest > original:
        raise ConfigError(
            f"the model's rotary frequencies (longrope) change at {original:,} tokens, and prompts and "
            f"completions may have {longest:,} together: use rollout.engine=vllm, or lower "
            "rollout.max_prompt_length and max_completion_length"
        )


def _refuse_integers(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    if not hf_config.get("quantization_config"):
        return
    if config.stage in ("generate", "evaluate") and config.rollout.engine == "vllm":
        raise ConfigError(
            f"model.path {config.model.path} holds integer weights, which rollout.engine=vllm cannot get: "
            "take rollout.engine=sampler, or let vLLM read the folder itself (r1hpc.serve)"
        )
    if trains(config.stage):
        raise ConfigError(
            f"model.path {config.model.path} holds integer weights, which cannot be trained: give the "
            "folder that they were made from"
        )


def _check_teacher(config: RunConfig, expected: Mapping[str, Any] | None, *, tokenizer_to_come: bool) -> None:
    """Refuse a teacher that cannot be loaded, or whose tokens differ from the student's. Files that an
    earlier stage has yet to write are checked by the ranks."""
    hf_config = load_teacher_config(config, expected)
    if hf_config is None or not Path(config.rl.teacher or "", "config.json").is_file():
        return
    if hf_config.get("quantization_config"):
        raise ConfigError(
            f"rl.teacher {config.rl.teacher} holds integer weights, which cannot be loaded as a teacher: "
            "give the folder that they were made from"
        )
    teacher = teacher_of(config, hf_config)
    try:
        check_weights(teacher)
        check_tensors(teacher, hf_config)
    except ConfigError as error:
        raise ConfigError(f"rl.teacher, as a model.path of its own: {error}") from None
    if not tokenizer_to_come:
        from r1hpc.tasks.text.tokenizer import check_teacher_tokens  # the tokenizers library

        check_teacher_tokens(config)


def _other_end(config: RunConfig) -> list[str]:
    """Return a note if a teacher ends its answers with a token that does not end the student's."""
    if not Path(config.rl.teacher or "", "tokenizer.json").is_file():
        return []
    from r1hpc.tasks.text.tokenizer import load_tokenizer, special_ids  # the tokenizers library

    teacher = ModelConfig(path=config.rl.teacher)
    tokenizer = load_tokenizer(teacher)
    try:
        end = special_ids(tokenizer, teacher).eos
    except UsageError:  # a teacher needs neither end tokens nor a chat template
        return []
    if end in special_ids(load_tokenizer(config.model), config.model).stops:
        return []
    return [
        f"rl.teacher ends an answer with {tokenizer.id_to_token(end)}, and the student's completions go on "
        f"after it, up to rollout.max_completion_length: add its id, {end}, to eos_token_id in the student's "
        "generation_config.json, or start from a student fine-tuned to the teacher's chat template"
    ]


def tokenizer_is_to_come(config: RunConfig, expected_model: Mapping[str, Any] | None) -> bool:
    """True if an earlier stage has yet to write the tokenizer."""
    return expected_model is not None and config.model.tokenizer is None


def other_tokenizer(config: RunConfig) -> list[str]:
    """Return a note if model.tokenizer is not the one the weights were trained with."""
    if config.stage in ("pretrain", "traces") or config.model.from_scratch:
        return []
    from r1hpc.tasks.text.tokenizer import other_vocabulary

    return list(filter(None, [other_vocabulary(config.model)]))


def check_zero_goes_on(run: RunDir, config: RunConfig) -> None:
    """Refuse a ZeRO stage that the checkpoint cannot be converted to, before the queue."""
    newest = next(iter(CheckpointStore(run.checkpoints).list()), None)
    if newest is None:
        return
    saved, asked = newest.manifest.meta.get("zero_stage"), config.deepspeed.zero_stage
    if not zero_converts(saved, asked):
        raise UsageError(
            f"{run.run_id} has a checkpoint of ZeRO {saved}, and DeepSpeed converts only between 1 and 2: "
            f"resume with deepspeed.zero_stage={saved}, or begin another run from an export of this one"
        )


def seldom_meant(config: RunConfig, others: Mapping[Path, RunConfig] = {}) -> list[str]:
    """Return notes worth reading before GPU-hours are spent; `others`: the chain's other stages by folder."""
    notes = [*_without_effect(config), *_rates(config)]
    if samples(config.stage):
        notes += _asked_otherwise(config, others)
        longest = config.rollout.max_completion_length
        asks_files = config.evaluate.path or config.evaluate.sets or config.task.name in ("file", "jsonl")
        if asks_files and longest == RolloutConfig().max_completion_length:
            notes += [f"answers are cut off at rollout.max_completion_length={longest} tokens, the default"]
    return notes


def _without_effect(config: RunConfig) -> Iterator[str]:
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


def _asked_otherwise(config: RunConfig, others: Mapping[Path, RunConfig]) -> Iterator[str]:
    """Yield notes if prompts differ from those of the run that trained the model, or answers end earlier."""
    folder = Path(config.model.path or "")
    run = RunDir(folder.parent)
    if folder.name != run.model.name:
        return
    before = others.get(run.path)
    if run.config.is_file():
        try:
            before = load.read(run.config)
        except R1hpcError:  # another tool's folder
            return
    if before is None or before.stage == "pretrain":
        return
    pairs: dict[str, tuple[Any, Any]] = {
        f"model.{name}": (getattr(before.model, name), getattr(config.model, name))
        for name in ("system_prompt", "open_thinking")
    }
    bare = before.model.chat_template == "none", config.model.chat_template == "none"
    pairs["model.chat_template=none"] = bare
    if samples(before.stage):
        pairs["reward.answer_in"] = (before.reward.answer_in, config.reward.answer_in)
        if before.task.name == config.task.name:
            templates = before.task.options.get("template"), config.task.options.get("template")
            pairs["task.options.template"] = templates
        lengths = before.rollout.max_completion_length, config.rollout.max_completion_length
        if lengths[1] < lengths[0]:
            pairs["rollout.max_completion_length"] = lengths
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            said = f"{name} is {ours!r:.60} here, and was {theirs!r:.60}"
            yield f"{said} in {run.run_id}, which trained this model"
