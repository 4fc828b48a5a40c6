"""Settings under the names that transformers' and TRL's arguments give them, and what they are here.

name_here("train.learning_rate")        # "train.lr"

From transformers.TrainingArguments, trl.SFTConfig, GRPOConfig, ModelConfig and peft.LoraConfig, by their
documentation.
"""

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
    "epsilon": "rl.clip_low",
    "epsilon_high": "rl.clip_high",
    "teacher_model": "rl.teacher",
    "teacher_model_name_or_path": "rl.teacher",
    "loss_type": "rl.algorithm, rl.loss_level",
    "scale_rewards": "rl.scale_advantage",
    "num_iterations": "rl.num_iterations",
    "reward_funcs": "reward.terms",
    "reward_weights": "reward.terms",
    "run_name": "--run-name",
    "output_dir": "--run-root",
    "resume_from_checkpoint": "--resume",
}


def name_here(key: str) -> str | None:
    """What the last part of a dotted key is called here, where it is one of those names."""
    return _HERE.get(key.rpartition(".")[2])
