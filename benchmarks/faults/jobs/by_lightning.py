"""Lightning with its SLURM requeue and a checkpoint every SAVE_EVERY steps."""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.faults.jobs.small import BATCH, SAVE_EVERY, STEPS, Samples, Small, begin, finished, took


class Module(lightning.LightningModule):  # type: ignore[misc]
    """The model and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Small()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_start(self) -> None:
        begin()

    def on_train_batch_end(self, *_: Any) -> None:
        took(self.trainer.global_step)


def main(out: Path) -> None:
    """Resume from the newer of the requeue's checkpoint and the last periodic one."""
    kept = ModelCheckpoint(dirpath=out / "kept", every_n_train_steps=SAVE_EVERY, save_last=True)
    candidates = [*out.glob("hpc_ckpt_*.ckpt"), *(out / "kept").glob("last.ckpt")]
    newest = max(candidates, key=lambda path: path.stat().st_mtime, default=None)
    quiet: Any = {"logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, default_root_dir=out, callbacks=[kept], **quiet
    )
    module = Module()
    trainer.fit(module, DataLoader(Samples(), batch_size=BATCH), ckpt_path=newest)
    if trainer.global_step == STEPS:
        finished(module.model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
