# mypy: ignore-errors
"""transformers' Trainer as its users write it: a tiny GPT-2 with dropout, two epochs, evaluations."""

import argparse
import hashlib
import json
import os
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--pause", type=float, default=0.0, help="seconds of a batch of an evaluation")
parser.add_argument("--every", type=int, default=9, help="steps between two checkpoints")
arguments = parser.parse_args()

torch.set_num_threads(1)
set_seed(1)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int) -> None:
        self.tokens = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Slow(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        print("evaluates", state.global_step, flush=True)
        time.sleep(arguments.pause)


model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=arguments.out,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=arguments.every,
        save_steps=arguments.every,
        save_total_limit=1,
        train_sampling_strategy="group_by_length",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=Rows(120, 1),
    eval_dataset=Rows(16, 2),
    callbacks=[Slow()],
)
trainer.train()
trainer.save_model(arguments.out + "/final")
if os.environ.get("RANK", "0") == "0":
    keep = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "train_loss")
    for line in trainer.state.log_history:
        print(
            "logged", json.dumps({key: float(line[key]).hex() for key in keep if key in line}, sort_keys=True)
        )
    weights = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
    print(
        "weights",
        hashlib.md5(weights).hexdigest(),
        (trainer.state.best_model_checkpoint or "").rpartition("/")[2],
        flush=True,
    )
