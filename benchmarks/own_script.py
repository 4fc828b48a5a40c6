"""Time an unmodified Trainer script alone and under r1hpc, with two ranks: a step, until the first, a save.

A save alone is the Trainer's own, followed by one `sync -f`. The wrapper is the process of r1hpc that each
rank's script is a child of.

python -m benchmarks.own_script [--steps 300] [--width 64]
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

from r1hpc.slurm.rank_env import choose_port
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import read_events
from tests.runs import rank_pids, run_environment, submit, wait_over, wait_step

SCRIPT = """
import json, os, subprocess, sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

torch.set_num_threads(1)
steps, width, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ends, saves = [], []


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        ends.append(time.time())


class Durable(Trainer):
    def _save_checkpoint(self, *arguments):
        began = time.time()
        super()._save_checkpoint(*arguments)
        if "R1HPC_RUN_DIR" not in os.environ:
            subprocess.run(["sync", "-f", f"{out}/checkpoint-{self.state.global_step}"], check=True)
            saves.append(time.time() - began)


rows = [{"input_ids": (row := torch.arange(64) % 50), "labels": row}] * 64
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=width, n_layer=2, n_head=2))
arguments = TrainingArguments(
    out, max_steps=steps, save_steps=max(1, steps // 6), save_total_limit=2, logging_steps=50, report_to=[],
    use_cpu=True, disable_tqdm=True,
)
Durable(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
print("ends", json.dumps(ends), flush=True)
print("saves", json.dumps(saves), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64, help="of the model; 1024: a checkpoint of 290 MiB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        script = Path(root) / "train.py"
        script.write_text(SCRIPT)
        words = [str(given.steps), str(given.width), f"{root}/out"]
        began = time.time()
        text = _run_alone(script, words)
        alone, saves_alone = _numbers(text, "ends"), _numbers(text, "saves")
        first_alone = alone[0] - began
        began = time.time()
        options = ["--nodes", "2", "resources.gpus_per_node=0", "checkpoint.keep=2"]
        run = submit(Path(root), "run", *options, "--", *words, job=str(script)).run
        wait_step(run, 1)
        wrapper_mib = _peak_mib(rank_pids(run)[0])
        wait_over(run)
        ours = _numbers((run.logs / "attempt_1" / "rank_0.out").read_text(), "ends")
        saves_ours = [event["seconds"] for event in read_events(run) if event["event"] == "save"]
        begun = float(read_history(run).attempts[0].start)
    first_ours, step_alone, step_ours = ours[0] - begun, _step_s(alone), _step_s(ours)
    print(
        f"a step: alone {step_alone * 1e3:.2f} ms, r1hpc {step_ours * 1e3:.2f} ms, "
        f"{(step_ours - step_alone) * 1e3:+.2f} ms, ratio {step_ours / step_alone:.3f}"
    )
    print(
        f"to the first step: alone {first_alone:.1f} s, r1hpc {first_ours:.1f} s from the attempt's begin, "
        f"ratio {first_ours / first_alone:.2f}; {begun - began:.1f} s before that for submit"
    )
    save_alone, save_ours = statistics.median(saves_alone[1:]), statistics.median(saves_ours[1:])
    print(
        f"a save: alone with sync -f {save_alone:.2f} s, r1hpc {save_ours:.2f} s, "
        f"ratio {save_ours / save_alone:.2f}; the wrapper's peak memory: {wrapper_mib:.0f} MiB"
    )


def _run_alone(script: Path, words: list[str]) -> str:
    with choose_port() as listener:
        port = str(listener.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *words],
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


def _numbers(text: str, name: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    found: list[float] = json.loads(line.removeprefix(name))
    return found


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _step_s(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(ends[10:]))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
