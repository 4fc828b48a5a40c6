"""A DDP loop of one's own by r1hpc.client; the same under plain Python."""

import argparse
import hashlib
import os
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from r1hpc import attempt
from r1hpc.client.states import TorchState

parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--pause", type=float, default=0.0)
arguments = parser.parse_args()

torch.set_num_threads(1)
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("gloo")
run = attempt()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
net = DistributedDataParallel(model) if run.world_size > 1 else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(run.rank)
state = TorchState(model=model, optimizer=optimizer)
run.resume(state)
for step in run.steps(arguments.steps, save_every=10, state=state):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step * 1000 + run.rank))
    loss = (net(x) - x.sum(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(arguments.pause)
    run.log(loss=loss, lr=1e-3)
if run.rank == 0:
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    print("weights", hashlib.md5(weights).hexdigest(), flush=True)
