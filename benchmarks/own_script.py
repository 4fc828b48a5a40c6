"""Time an unmodified Trainer script alone and under r1hpc, with two ranks: a step, and until the first.

python -m benchmarks.own_script [--steps 300]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.rank_env import choose_port
from tests.runs import run_environment, submit, wait_over

SCRIPT = """
import json, sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

torch.set_num_threads(1)
steps, out = int(sys.argv[1]), sys.argv[2]
ends = []


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        ends.append(time.time())


rows = [{"input_ids": (row := torch.arange(64) % 50), "labels": row}] * 64
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=2))
arguments = TrainingArguments(
    out, max_steps=steps, save_strategy="no", logging_steps=50, report_to=[], use_cpu=True, disable_tqdm=True
)
Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
print("ends", json.dumps(ends), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as root:
        script = Path(root) / "train.py"
        script.write_text(SCRIPT)
        began = time.time()
        alone = _ends(_run_alone(script, steps, root))
        first_alone = alone[0] - began
        began = time.time()
        words = [
            "--nodes",
            "2",
            "resources.gpus_per_node=0",
            "checkpoint.save_every=1000000",
            "--",
            str(steps),
            root,
        ]
        run = submit(Path(root), "run", *words, job=str(script)).run
        wait_over(run)
        ours = _ends((run.logs / "attempt_1" / "rank_0.out").read_text())
        begun = _script_began(run)
    first_ours, step_alone, step_ours = ours[0] - begun, _step_s(alone), _step_s(ours)
    print(
        f"a step: alone {step_alone * 1e3:.2f} ms, r1hpc {step_ours * 1e3:.2f} ms, "
        f"{(step_ours - step_alone) * 1e3:+.2f} ms, ratio {step_ours / step_alone:.3f}"
    )
    print(
        f"to the first step: alone {first_alone:.1f} s, r1hpc {first_ours:.1f} s from the attempt's begin, "
        f"ratio {first_ours / first_alone:.2f}; {begun - began:.1f} s before that for submit"
    )


def _run_alone(script: Path, steps: int, root: str) -> str:
    with choose_port() as listener:
        port = str(listener.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(steps), root],
            env=run_environment()
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": port},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    return said[0]


def _ends(text: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith("ends "))
    found: list[float] = json.loads(line[5:])
    return found


def _step_s(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(ends[10:]))


def _script_began(run: RunDir) -> float:
    from r1hpc.telemetry.records.attempts import read_history

    begun = read_history(run).attempts[0].start
    return float(begun)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
