# mypy: ignore-errors
"""An Accelerate loop that saves after the last batch of a pass, then evaluates; it is told to stop there."""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--restarts-its-count", action="store_true", help="names the folder of step 8 step_2")
given = parser.parse_args()
out = given.out

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
rows, held_out = torch.randn(16, 4), torch.randn(8, 4)
model, optimizer, loader, evaluation = accelerator.prepare(
    model, optimizer, DataLoader(rows, 4, shuffle=True), DataLoader(held_out, 4)
)
saved = Path(os.environ.get("R1HPC_RUN_DIR", ""), "checkpoints/step-00000004")
begin = 0
if saved.is_dir():
    accelerator.load_state()
    begin = 1
step = 4 * begin
for _ in range(begin, 3):
    model.train()
    for batch in loader:
        accelerator.backward(model(batch).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 8 and given.restarts_its_count:
            accelerator.save_state(f"{out}/step_2")
        if step == 4:
            if "R1HPC_RUN_DIR" in os.environ and not given.restarts_its_count:
                os.kill(os.getpid(), signal.SIGTERM)
            accelerator.save_state(f"{out}/step_{step}")
    model.eval()
    for batch in evaluation:
        model(batch)
weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
print("weights", hashlib.md5(weights).hexdigest(), flush=True)
