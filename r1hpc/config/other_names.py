"""Find our setting for another library's name (for errors of load.py), and drop removed settings of ours.

name_here("train.learning_rate")        # "train.lr", as in TRL
is_removed("rl.by_pass_rate")           # True: earlier versions had it

The names of transformers.TrainingArguments, trl.SFTConfig, GRPOConfig, ModelConfig and peft.LoraConfig are
those of their documentation.
"""

import copy
import difflib
from typing import Any

from r1hpc.config.layers import value_at

REMOVED = {
    "data.mix": ("online", "every", "smoothing"),
    "rl": ("by_pass_rate",),
    "cluster": ("network_gbit_s",),
}
"""Settings that earlier runs have and today's code ignores."""
_HERE = {
    "learning_rate": "train.lr",
    "max_steps": "train.num_steps",
    "num_train_epochs": "train.num_steps (epochs x samples / train.global_batch_size)",
    "train_batch_size": "train.global_batch_size, over all ranks",
    "per_device_train_batch_size": "train.micro_batch_size (the whole batch is train.global_batch_size)",
    "batch_size": "train.global_batch_size, over all ranks",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps, in steps",
    "weight_decay": "train.weight_decay",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "adam_epsilon": "train.eps",
    "max_grad_norm": "train.max_grad_norm",
    "min_lr_rate": "train.min_lr_fraction",
    "logging_steps": "train.print_every",
    "seed": "train.seed",
    "data_seed": "data.seed",
    "gradient_checkpointing": "model.activation_checkpointing",
    "name_or_path": "model.path",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "attn_implementation": "model.attn_implementation",
    "lora_r": "model.lora_rank",
    "lora_alpha": "model.lora_alpha",
    "lora_target_modules": "model.lora_targets",
    "target_modules": "model.lora_targets",
    "load_in_4bit": "model.base_quantization=nf4",
    "bnb_4bit_quant_type": "model.base_quantization",
    "max_length": "data.seq_len (stage sft), rollout.max_completion_length (stage rl)",
    "max_seq_length": "data.seq_len",
    "dataset_name": "data.traces (stage sft), task.options.path (stage rl)",
    "train_file": "data.traces",
    "save_steps": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "train.validate_every (stages pretrain, sft), evaluate.every (stage rl)",
    "num_generations": "rollout.num_generations",
    "max_new_tokens": "rollout.max_completion_length",
    "max_prompt_length": "rollout.max_prompt_length",
    "max_completion_length": "rollout.max_completion_length",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "beta": "rl.kl_coef",
    "use_bias_correction_kl": "rl.kl_gradient (true: corrected, false: value)",
    "epsilon": "rl.clip_low",
    "epsilon_high": "rl.clip_high (of loss_type=cispo epsilon_high - 1)",
    "delta": "rl.dual_clip",
    "importance_sampling_level": "rl.ratio",
    "mask_truncated_completions": "rl.mask_truncated",
    "entropy_coef": "rl.entropy_coef",
    "generation_batch_size": "rollout.num_prompts x rollout.num_generations",
    "use_vllm": "rollout.engine=vllm",
    "vllm_importance_sampling_correction": "rl.importance_sampling",
    "vllm_importance_sampling_clip_max": "rl.importance_cap",
    "vllm_importance_sampling_clip_min": "rl.importance_low, with rl.importance_mask=ratio",
    "vllm_importance_sampling_mode": "rl.importance_mask (token_mask: ratio), rl.importance_level",
    "teacher_model": "rl.teacher",
    "teacher_model_name_or_path": "rl.teacher",
    "loss_type": "rl.loss_level (dapo: token, grpo: sequence, dr_grpo: constant), rl.objective (cispo)",
    "scale_rewards": "rl.scale_advantage",
    "num_iterations": "rl.num_iterations",
    "reward_funcs": "reward.terms",
    "reward_weights": "reward.terms",
    "run_name": "--run-name",
    "output_dir": "--run-root",
    "resume_from_checkpoint": "--resume",
    "online": "data.mix.schedule (weights that follow the losses, odm, were removed after 0.1.0)",
}


def name_here(key: str, likeness: float = 1.0) -> str | None:
    """Return the setting here for the last part of a dotted key, a name of those libraries or one like it."""
    names = difflib.get_close_matches(key.rpartition(".")[2], _HERE, n=1, cutoff=likeness)
    return _HERE[names[0]] if names else None


def without_removed(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer of an earlier version without the settings that are gone."""
    layer = copy.deepcopy(layer)
    for section, keys in REMOVED.items():
        values = value_at(layer, section)
        for key in keys if isinstance(values, dict) else ():
            values.pop(key, None)
    return layer


def is_removed(key: str) -> bool:
    """True if earlier versions had this dotted key."""
    section, _, name = key.rpartition(".")
    return name in REMOVED.get(section, ())
