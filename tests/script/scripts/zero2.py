"""A DeepSpeed ZeRO 2 script by r1hpc.client."""

import os
import sys
import time

import deepspeed
import torch

from r1hpc import attempt
from r1hpc.client.states import DeepSpeedState

steps, pause = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, on CPUs
deepspeed.init_distributed("gloo")
run = attempt()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    },
)
torch.manual_seed(int(os.environ["RANK"]))
state = DeepSpeedState(engine)
run.resume(state)
for step in run.steps(steps, save_every=10, state=state):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step * 1000 + run.rank))
    loss = (engine(x) - x.sum(1, keepdim=True)).pow(2).mean()
    engine.backward(loss)
    engine.step()
    time.sleep(pause)
    run.log(loss=loss, lr=1e-3)
