# mypy: ignore-errors
"""TRL's GRPOTrainer on a tiny GPT-2; a generation serves several steps, the reference model moves."""

import argparse
import hashlib
import json
import os

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
arguments = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
words = {word: number for number, word in enumerate(["<pad>", "<eos>", *(f"w{n}" for n in range(60))])}
plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", padding_side="left"
)
config = GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, pad_token_id=0
)
base = f"{arguments.out}-base-{os.environ.get('RANK', '0')}"  # the reference model is loaded from a folder
GPT2LMHeadModel(config).save_pretrained(base)


def reward(completions, **kwargs):
    return [
        sum(word in ("w1", "w2", "w3", "w7") for word in text.split()) + len(text) / 100
        for text in completions
    ]


trainer = GRPOTrainer(
    model=base,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=arguments.out,
        max_steps=30,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_iterations=2,
        num_generations=4,
        max_completion_length=8,
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=5,
        learning_rate=1e-3,
        logging_steps=3,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"w{n} w{n + 1} w{n + 2}" for n in range(20)]}),
    processing_class=tokenizer,
)
trainer.train()
times = ("time", "per_second", "total_flos", "shapes")
for line in trainer.state.log_history:
    numbers = {key: float(value).hex() for key, value in line.items() if not any(t in key for t in times)}
    print("logged", json.dumps(numbers, sort_keys=True))
weights = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
print("weights", hashlib.md5(weights).hexdigest(), flush=True)
