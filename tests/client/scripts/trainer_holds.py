# mypy: ignore-errors
"""A Trainer script that holds what only its own objects know: generators, an EMA, counters, a global."""

import argparse
import copy
import hashlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seed", type=int, help="of the collator; without it torch's own stream")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--stream", action="store_true")
parser.add_argument("--dies", type=int, help="it saves with each evaluation, and ends so after step 10, once")
given = parser.parse_args()

torch.set_num_threads(1)
set_seed(3)
num_steps = 0
generator = np.random.default_rng(3)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.noise = np.random.RandomState(4)

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 30, (12,), generator=torch.Generator().manual_seed(index))
        if given.workers:
            return {"input_ids": tokens, "labels": tokens}
        tokens[0] = self.noise.randint(30)
        return {"input_ids": tokens}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        rows = Rows()
        yield from (rows[index] for index in range(14))


class Holds(TrainerCallback):
    def __init__(self) -> None:
        self.total, self.drawn, self.shadow = 0, [], {}
        self.own, self.ema = random.Random(5), None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema = copy.deepcopy(model)
        self.shadow = {name: value.clone() for name, value in model.state_dict().items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        global num_steps
        num_steps += 1
        self.total += int(generator.integers(100))
        self.drawn.append(self.own.random())
        for name, value in model.state_dict().items():
            self.shadow[name].mul_(0.9).add_(value * 0.1)
        for mean, value in zip(self.ema.parameters(), model.parameters(), strict=True):
            mean.data.mul_(0.9).add_(value.data, alpha=0.1)
        ends = (5, 9, 17) if given.dies is None else (5, 9, 10, 17)
        if state.global_step in ends and "R1HPC_RUN_DIR" in os.environ:
            mark = given.out / f"stopped-{state.global_step}"
            if not mark.exists():
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
                if state.global_step == 10:
                    os._exit(given.dies)
                os.kill(os.getpid(), signal.SIGTERM)


words = {f"w{number}": number for number in range(30)} | {"[MASK]": 30, "[PAD]": 31}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[PAD]")),
    mask_token="[MASK]",
    pad_token="[PAD]",
)
masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, seed=given.seed)
shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
model = BertForMaskedLM(BertConfig(vocab_size=32, max_position_embeddings=16, **shape))
holds = Holds()
trainer = Trainer(
    model,
    TrainingArguments(
        str(given.out),
        max_steps=24,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no" if given.dies is None else "steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=given.workers,
        dataloader_persistent_workers=given.workers > 0,
        remove_unused_columns=False,
    ),
    data_collator=default_data_collator if given.workers else masking,
    train_dataset=Stream() if given.stream else Rows(),
    eval_dataset=torch.utils.data.Subset(Rows(), range(10)),
    callbacks=[holds],
)
trainer.train()


def digest(state) -> str:
    return hashlib.md5(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


for line in trainer.state.log_history:
    print("logged", line["step"], line.get("loss"), line.get("eval_loss"))
print("weights", digest(model.state_dict()), digest(holds.ema.state_dict()), digest(holds.shadow))
print("weights", holds.total, num_steps, sum(holds.drawn), len(holds.drawn), flush=True)
