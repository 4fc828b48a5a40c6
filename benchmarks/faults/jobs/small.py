"""The parts that all five jobs share: model, samples, and what the bench reads of them.

The folder FAULTS_LOG gets a line for each step, the process's number and the last weights.
"""

import os
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

STEPS, SAVE_EVERY, BATCH = 160, 10, 8  # at half a second a step, longer than any grace time
_LOG = Path(os.environ.get("FAULTS_LOG", "/nonexistent"))
_PAUSE_S = float(os.environ.get("FAULTS_PAUSE_S", "0"))


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Every sample is a function of its number."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs = torch.randn(16, generator=torch.Generator().manual_seed(index))
        return {"inputs": inputs, "labels": inputs.sum(0, keepdim=True)}


class Small(torch.nn.Module):
    """Two layers; the loss first, as transformers' Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        torch.set_num_threads(1)
        first, last = torch.nn.Linear(16, 32), torch.nn.Linear(32, 1)
        self.layers = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Dropout(0.1), last)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layers(inputs) - labels).square().mean()}


def batch(step: int) -> dict[str, torch.Tensor]:
    """Return the samples of a step, counted from 1."""
    samples = [Samples()[index] for index in range((step - 1) * BATCH, step * BATCH)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("inputs", "labels")}


def train_step(model: Small, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Take one step and return its loss."""
    loss = model(**batch(step))["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.item())


def begin() -> None:
    """Wait in the first attempt until the jobs of all arms are there, so that the faults meet all alike."""
    _LOG.mkdir(parents=True, exist_ok=True)
    (_LOG / "pid").write_text(str(os.getpid()))
    while _PAUSE_S and not (_LOG.parent / "go").exists():
        time.sleep(0.1)


def took(step: int) -> None:
    """Record a step, and make it last."""
    with (_LOG / "steps").open("a") as log:
        print(step, file=log)
    time.sleep(_PAUSE_S)


def finished(model: torch.nn.Module) -> None:
    """Record the weights of a finished job."""
    torch.save(model.state_dict(), _LOG / "weights.pt")
