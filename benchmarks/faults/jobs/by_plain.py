"""A loop that loads the last checkpoint by itself: for a script with `--requeue`."""

import sys
from pathlib import Path

import torch

from benchmarks.faults.jobs.small import SAVE_EVERY, STEPS, Small, begin, finished, took, train_step


def train(out: Path) -> None:
    """Take the steps that are left; save every SAVE_EVERY, by a rename."""
    out.mkdir(parents=True, exist_ok=True)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoint, done = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    begin()
    for step in range(done + 1, STEPS + 1):
        train_step(model, optimizer, step)
        took(step)
        if step % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step, "random": torch.get_rng_state(), **state}, out / "new.pt")
            (out / "new.pt").replace(checkpoint)
    finished(model)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
