"""Train the recipe of benchmarks/grpo.py in TRL, asked in the same form and scored by the same Scorer."""

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.grpo import HELD_OUT, Arm
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.text.tokenizer import form_of, load_tokenizer, special_ids


def train_with_trl(config: RunConfig, arm: Arm, steps: int, evaluate_every: int, out: Path) -> None:
    """Train in this process; write the times of the steps, the accuracies and the mean rewards to `out`."""
    start = Path(config.model.path or "")
    task, rollout, train = make_task(config.task), config.rollout, config.train
    own = load_tokenizer(config.model)
    form, ids = form_of(own, config.model), special_ids(own, config.model)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(start / "tokenizer.json"),
        pad_token=own.id_to_token(ids.pad),
        eos_token=own.id_to_token(ids.eos),
        padding_side="left",
    )
    micro = min(train.micro_batch_size, train.global_batch_size // arm.processes)
    steps_told: list[list[float]] = []
    items = [task.item(index) for index in range(rollout.num_prompts * steps)]
    held_out = [task.item(index, held_out=True) for index in range(HELD_OUT)]
    scorer = Scorer(config.reward, task, max_completion_length=rollout.max_completion_length)

    def reward(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        made = [
            Completion(form.said(own.decode(ids)), len(ids), ids[-1] != tokenizer.eos_token_id)
            for ids in completion_ids
        ]
        size = rollout.num_generations
        groups = [(items[index[g]], made[g : g + size]) for g in range(0, len(made), size)]
        found = [score.reward for group in scorer.score_groups(groups) for score in group]
        ties = [max(found[g : g + size]) == min(found[g : g + size]) for g in range(0, len(found), size)]
        steps_told.append([statistics.fmean(each) for each in (found, ties, map(len, completion_ids))])
        return found

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        """The end of each step, and now and then the accuracy of greedy decoding."""

        def __init__(self) -> None:
            self.times: dict[int, float] = {}
            self.greedy: dict[int, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.times[state.global_step] = time.time()
            if evaluate_every and state.global_step % evaluate_every == 0:
                self.greedy[state.global_step] = self.evaluate(model)

        def evaluate(self, model: Any) -> float:
            prompts = [form.prompt(item.prompt) for item in held_out]
            asked = tokenizer(prompts, return_tensors="pt", padding=True)
            with torch.no_grad():
                found = model.generate(
                    input_ids=asked["input_ids"],
                    attention_mask=asked["attention_mask"],
                    max_new_tokens=rollout.max_completion_length,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            texts = tokenizer.batch_decode(found[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            groups = [
                (item, [Completion(text, len(text), False)])
                for item, text in zip(held_out, texts, strict=True)
            ]
            return statistics.fmean(group[0].correct for group in scorer.score_groups(groups))

    arguments = trl.GRPOConfig(
        output_dir=str(out.parent / "trl"),
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=train.global_batch_size // micro // arm.processes,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        learning_rate=train.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=train.warmup_steps,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        beta=config.rl.kl_coef,
        epsilon=config.rl.clip_low,
        epsilon_high=config.rl.clip_high,
        loss_type="dapo",
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=train.seed,
        **(arm.settings or {}),
    )
    watch = Watch()
    data = datasets.Dataset.from_dict(
        {"prompt": [form.prompt(item.prompt) for item in items], "index": list(range(len(items)))}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(start, attn_implementation="sdpa")
    with scorer:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    # Each process has rewarded its own share of a step.
    shares = [steps_told]
    if arm.processes > 1:
        shares = [[] for _ in range(arm.processes)]
        torch.distributed.all_gather_object(shares, steps_told)
    if trainer.is_world_process_zero():
        means = [statistics.fmean(column) for column in zip(*itertools.chain(*shares), strict=True)]
        out.write_text(json.dumps({"times": watch.times, "greedy": watch.greedy, "means": means}))
