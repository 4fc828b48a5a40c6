"""The states of the memory plan, against what real DeepSpeed holds on the CPU: three models, ZeRO 0 to 3.

pytest tests/plan/test_states.py -m soak -s        # prints both
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.config.schema import Precision
from r1hpc.plan.memory import state_bytes
from tests.plan.deepspeed_states import BUCKET_ELEMENTS
from tests.runs import CHECKOUT, run_environment


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
    assert len(found) == 12
    for each in found:
        stage, count = each["zero_stage"], each["parameters"]
        planned = sum(state_bytes(count, stage, world_size, Precision.bf16))
        # ZeRO 3 keeps its gradient bucket; the others free theirs before we look.
        buckets = 2 * BUCKET_ELEMENTS if stage == 3 else 0
        held = (each["bytes"] - buckets) / count
        print(f"{each['model']} ZeRO {stage} on {world_size}: {held:.2f}, planned {planned / count:.2f}")
        assert planned / count == pytest.approx(held, rel=0.05), each
