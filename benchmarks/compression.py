"""Measure the loss and the bytes on the wire under train.gradient_compression, beside runs without it.

    python benchmarks/compression.py [--steps 200] [--seeds 3] [--hidden-size 256]

Two CPU ranks, ZeRO 0, fp32, a one-layer Qwen2 on real text, every run through the public command. Printed for
each compression: the bytes a rank sends for the gradients of a step and how many times fewer that is than
without, and the mean loss of the last 20 steps minus that without compression at the same seed: mean and 95 %
interval of Student's t over the seeds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
LAST = 20
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % quantile, by the number of seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, choices=STUDENT)
    parser.add_argument("--hidden-size", type=int, default=256)
    options = parser.parse_args()
    losses: dict[str, list[float]] = {}
    sent: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for method in ("none", "int8", "powersgd"):
                loss, sent[method] = train(Path(folder), method, seed, options)
                losses.setdefault(method, []).append(loss)
                print(f"seed {seed}, {method}: loss {loss:.4f}, {sent[method]} bytes a step", flush=True)
    for method in ("int8", "powersgd"):
        pairs = [a - b for a, b in zip(losses[method], losses["none"], strict=True)]
        half = STUDENT[options.seeds] * statistics.stdev(pairs) / math.sqrt(options.seeds)
        print(
            f"{method}: {sent['none'] / sent[method]:.2f} x fewer bytes; loss {statistics.mean(pairs):+.4f} "
            f"(+- {half:.4f}) beside {statistics.mean(losses['none']):.4f}"
        )


def train(root: Path, method: str, seed: int, options: argparse.Namespace) -> tuple[float, int]:
    """(mean loss of the last steps, bytes a step) of one run."""
    words = [
        *("deepspeed.zero_stage=0", "resources.ranks_per_node=2", "train.precision=fp32"),
        *("train.global_batch_size=8", "train.micro_batch_size=4", "data.seq_len=32", "train.lr=1e-3"),
        *("checkpoint.save_every=100000", "model.config.num_hidden_layers=1"),
        f"model.config.hidden_size={options.hidden_size}",
        f"model.config.intermediate_size={2 * options.hidden_size}",
        *(f"train.num_steps={options.steps}", f"train.seed={seed}", f"data.seed={seed}"),
        f"train.gradient_compression={method}",
    ]
    name = f"{method}-{seed}"
    command = [sys.executable, "-m", "r1hpc.submit", "jobs/smoke.yaml", "--executor", "local", "--follow"]
    command += ["--run-root", str(root), "--run-name", name, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, cwd=CHECKOUT, env=environment, check=True, stdout=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (root / name / "metrics" / "train.jsonl").read_text().splitlines()]
    return statistics.mean(step["loss"] for step in steps[-LAST:]), steps[-1]["gradient_bytes"]


if __name__ == "__main__":
    main()
