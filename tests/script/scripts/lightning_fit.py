# mypy: ignore-errors
"""A Lightning module as its users write it: dropout, noise in the data set, a validation, means."""

import argparse
import hashlib
import json
import os
import random

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
arguments = parser.parse_args()

torch.set_num_threads(1)
seed_everything(1)


class Noisy(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((16,), index / 60.0) + torch.rand(16) + random.random()


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7))

    def val_dataloader(self):
        return DataLoader(Noisy(), batch_size=20)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))

    def on_train_epoch_start(self):
        print("logged start", torch.rand(1).item().hex(), flush=True)

    def training_step(self, batch, index):
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        print("logged", self.global_step, loss.item().hex(), flush=True)
        return loss

    def on_train_epoch_end(self):
        print("logged epoch", self.trainer.callback_metrics["loss_epoch"].item().hex(), flush=True)

    def validation_step(self, batch, index):
        self.log("val_loss", (self.net(batch) - batch.sum(1, keepdim=True)).pow(2).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
trainer = Trainer(
    accelerator="cpu",
    devices=ranks_of_node,
    num_nodes=int(os.environ.get("WORLD_SIZE", "1")) // ranks_of_node,
    max_epochs=4,
    val_check_interval=7,
    log_every_n_steps=1,
    logger=CSVLogger(arguments.out),
    default_root_dir=arguments.out,
    enable_progress_bar=False,
)
model = Model()
trainer.fit(model, datamodule=Data())
print("logged end", trainer.validate(model, datamodule=Data(), verbose=False)[0]["val_loss"].hex())
metrics = {name: value.item().hex() for name, value in sorted(trainer.callback_metrics.items())}
print("weights", json.dumps(metrics), end=" ")
print(
    hashlib.md5(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest(),
    flush=True,
)
