"""The loop of docs/own-script.md."""

import torch

from benchmarks.faults.jobs.small import SAVE_EVERY, STEPS, Small, begin, finished, took, train_step
from r1hpc import attempt
from r1hpc.client.states import TorchState


def main() -> None:
    """Take the steps that are left."""
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = attempt()
    state = TorchState(model=model, optimizer=optimizer)
    run.resume(state)
    begin()
    for step in run.steps(STEPS, save_every=SAVE_EVERY, state=state):
        run.log(loss=train_step(model, optimizer, step), lr=1e-2)
        took(step)
    finished(model)


if __name__ == "__main__":
    main()
