# mypy: ignore-errors
"""A loop on Accelerate in the manner of its examples: dropout, shuffle, an evaluation, save_state."""

import argparse
import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--resume")
arguments = parser.parse_args()

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
set_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 60)
data = TensorDataset(torch.randn(160, 16, generator=torch.Generator().manual_seed(5)))
loader = DataLoader(data, batch_size=4, shuffle=True)
held_out = TensorDataset(torch.randn(12, 16, generator=torch.Generator().manual_seed(6)))
held_out = accelerator.prepare(DataLoader(held_out, batch_size=4, shuffle=True))
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

done = 0
if arguments.resume:
    accelerator.load_state(arguments.resume)
    done = int(Path(arguments.resume).name.split("_")[1])
batches_done = done * 2
for epoch in range(batches_done // len(loader), 3):
    skip = batches_done - epoch * len(loader) if batches_done > epoch * len(loader) else 0
    batches = accelerator.skip_first_batches(loader, skip) if skip else loader
    for (x,) in batches:
        with accelerator.accumulate(model):
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        print("logged", done, loss.item().hex(), flush=True)
        if accelerator.sync_gradients:
            done += 1
            if done % 3 == 0:
                seen = 0.0
                for (x,) in held_out:
                    with torch.no_grad():
                        seen += model(x).sum().item()
                    if done % 2:  # leaves its loop before the end
                        break
                print("logged", done, seen.hex(), flush=True)
            if done % 5 == 0:
                accelerator.save_state(Path(arguments.out) / f"step_{done}")
weights = b"".join(value.numpy().tobytes() for value in accelerator.unwrap_model(model).state_dict().values())
print("weights", hashlib.md5(weights).hexdigest(), flush=True)
