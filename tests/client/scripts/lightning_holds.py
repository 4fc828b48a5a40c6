# mypy: ignore-errors
"""A Lightning script that holds what only its own objects know; --tune looks for its learning rate."""

import argparse
import copy
import hashlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--tune", action="store_true")
given = parser.parse_args()

torch.set_num_threads(1)
seed_everything(1)
num_batches = 0
generator = np.random.default_rng(1)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.noise = random.Random(2)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((8,), index / 40.0) + self.noise.random()


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.net = 1e-2, torch.nn.Linear(8, 1)
        self.own, self.replay = torch.Generator().manual_seed(3), []
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def training_step(self, batch, index):
        self.replay = [*self.replay, batch.mean()][-5:]
        self.calls += 1
        noise = torch.rand(batch.shape, generator=self.own) * 0.1 + self.calls * 0.001
        loss = (self.net(batch + noise + sum(self.replay)) - batch.sum(1, keepdim=True)).pow(2).mean()
        self.log("loss", loss)
        print("logged", self.global_step, loss.item(), flush=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.net(batch).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Holds(Callback):
    def __init__(self) -> None:
        self.ema, self.total = None, 0

    def on_train_start(self, trainer, module):
        self.ema = copy.deepcopy(module.net)

    def on_train_batch_end(self, trainer, module, *rest):
        global num_batches
        num_batches += 1
        self.total += int(generator.integers(9))
        for mean, value in zip(self.ema.parameters(), module.net.parameters(), strict=True):
            mean.data.mul_(0.9).add_(value.data, alpha=0.1)
        if trainer.global_step in (4, 9, 17) and "R1HPC_RUN_DIR" in os.environ:
            mark = given.out / f"stopped-{trainer.global_step}"
            if not mark.exists():
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
                os.kill(os.getpid(), signal.SIGTERM)


def collate(rows):
    return torch.stack(rows) + float(generator.random())


holds, model = Holds(), Model()
trainer = Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=3,
    logger=CSVLogger(given.out),
    log_every_n_steps=1,
    default_root_dir=given.out,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[holds],
)
loader = DataLoader(Rows(), batch_size=4, shuffle=True, collate_fn=collate)
if given.tune:
    Tuner(trainer).lr_find(model, loader, num_training=20)
    print("logged lr", model.lr)
trainer.fit(model, loader, DataLoader(Rows(), batch_size=20))


def digest(state) -> str:
    return hashlib.md5(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


print("weights", digest(model.state_dict()), digest(holds.ema.state_dict()), holds.total, num_batches)
print("weights", model.calls.item(), sum(model.replay).item(), flush=True)
