# mypy: ignore-errors
"""TRL's SFTTrainer on a tiny GPT-2 with dropout; packed rows, a log every third step, two epochs."""

import argparse
import hashlib
import json

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
arguments = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
words = {word: number for number, word in enumerate(["<pad>", "<eos>", *(f"w{n}" for n in range(60))])}
plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
draw = torch.Generator().manual_seed(3)
rows = [" ".join(f"w{int(n)}" for n in torch.randint(0, 60, (9,), generator=draw)) for _ in range(150)]


trainer = SFTTrainer(
    model=GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)),
    args=SFTConfig(
        output_dir=arguments.out,
        max_length=32,
        packing=True,
        packing_strategy="wrapped",
        num_train_epochs=3,
        per_device_train_batch_size=2,
        logging_steps=3,
        save_steps=8,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"text": rows}),
    processing_class=tokenizer,
)
trainer.train()
times = ("runtime", "per_second", "total_flos", "shapes")
for line in trainer.state.log_history:
    numbers = {key: float(value).hex() for key, value in line.items() if not any(t in key for t in times)}
    print("logged", json.dumps(numbers, sort_keys=True))
weights = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
print("weights", hashlib.md5(weights).hexdigest(), flush=True)
