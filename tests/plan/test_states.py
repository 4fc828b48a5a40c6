"""The states of the memory plan, and what the optimizer's step makes beside them, against what real DeepSpeed
holds on the CPU: three models, ZeRO 0 to 3, and with the optimizer offloaded.

pytest tests/plan/test_states.py -m soak -s        # prints both
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.config.schema.run import Precision
from r1hpc.plan.memory.step import Zero, largest_tensor
from r1hpc.plan.model.shape import model_shape
from tests.plan.deepspeed_states import BUCKET_ELEMENTS, model_config
from tests.runs import CHECKOUT, run_environment

WIDTH = 2
"""Bytes of a bf16 number."""


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2])
def test_states_are_what_deepspeed_holds(world_size: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.plan.deepspeed_states"]
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(world_size)]
    ranks = []
    for number, log in enumerate(logs):  # not into pipes: DeepSpeed says more than one holds, and they wait
        with log.open("w") as out:
            words = [*command, str(number), str(world_size), str(tmp_path)]
            env = run_environment()
            ranks.append(subprocess.Popen(words, cwd=CHECKOUT, env=env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=1500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, "\n".join(log.read_text() for log in logs)
    found = json.loads((tmp_path / "states.json").read_text())
    assert len(found) == (21 if world_size == 1 else 12)
    for each in found:
        stage, count = each["zero_stage"], each["parameters"]
        largest = largest_of(each["model"])
        zero = Zero(count, stage, world_size, Precision.bf16, largest)
        states = zero.states
        if each["offload"]:
            weights, gradients, _ = states
            # What the norm is taken of is gone between the passes.
            buffers = WIDTH * largest if stage < 3 else 0
            # ZeRO 1 has copied its gradients to the host when it frees them.
            planned = in_step = weights + zero.offloaded + buffers + (gradients if stage == 1 else 0)
        else:
            planned = sum(states)
            in_step = planned + zero.step
        # ZeRO 3 keeps its gradient bucket; the others free theirs before we look.
        buckets = WIDTH * BUCKET_ELEMENTS if stage == 3 else 0
        held, inside = ((each[key] - buckets) / count for key in ("bytes", "step_bytes"))
        told = f"{held:.2f}, planned {planned / count:.2f}; in a step {inside:.2f}, {in_step / count:.2f}"
        where_to = ", offloaded" if each["offload"] else ""
        print(f"{each['model']} ZeRO {stage} on {world_size}{where_to}: {told}")
        assert planned / count == pytest.approx(held, rel=0.05), each
        assert in_step / count == pytest.approx(inside, rel=0.05), each


def largest_of(name: str) -> int:
    return largest_tensor(model_shape(model_config(name)))
