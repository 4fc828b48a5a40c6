"""An FSDP2 script by r1hpc.client."""

import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from r1hpc import attempt
from r1hpc.client.states import DcpState

steps, pause = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
run = attempt()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(run.rank)
state = DcpState(model, optimizer)
run.resume(state)
for step in run.steps(steps, save_every=10, state=state):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step * 1000 + run.rank))
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(pause)
    run.log(loss=loss, lr=1e-3)
