"""Adapters on a base in 4 bits beside adapters on the same base in bf16, and the first of them interrupted.

    make models/SmolLM2-135M-Instruct
    python -m benchmarks.qlora [--model DIR] [--steps 500] [--batch 4] [--seq-len 96]

The model learns to write the bodies of Python functions of the standard library from their heads and
docstrings, ZeRO 1, one rank and core each, every run through the public command: `lora` and `nf4` beside each
other; then `resumed`, which is `nf4` stopped halfway and gone on with in a new process. Printed: the loss on
held-out functions, the largest resident memory of a rank, seconds a step, and whether the model that
`resumed` left is that of `nf4` to the bit.
"""

import argparse
import ast
import filecmp
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
NUM_FUNCTIONS = 4000
HELD_OUT = 200
CHARACTERS = 2.2
"""A token of code has more, so that nothing is too long for a sequence."""

JOB = """
stage: sft
model: {lora_rank: 16, chat_template: none}
train: {precision: bf16, lr: 2e-4}
checkpoint: {save_every: 100000}
resources: {nodes: 1, gpus_per_node: 0, ranks_per_node: 1}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=CHECKOUT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--root", type=Path, help="where the runs are kept")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        print(f"not run: {options.model} is no model folder: make models/SmolLM2-135M-Instruct")
        return
    with tempfile.TemporaryDirectory() as folder:
        root = (options.root or Path(folder)).absolute()
        root.mkdir(exist_ok=True)
        (root / "job.yaml").write_text(JOB)
        write_functions(root / "functions.jsonl", options)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: train(root, name, options), ("lora", "nf4")))
        train(root, "resumed", options, stop_at=options.steps // 2)
        for name in ("lora", "nf4", "resumed"):
            print(name, json.dumps(read(root / name)), flush=True)
        names = sorted(path.name for path in (root / "nf4" / "model").iterdir())
        _, other, missing = filecmp.cmpfiles(
            root / "nf4" / "model", root / "resumed" / "model", names, shallow=False
        )
        if other + missing:
            raise SystemExit(f"the resumed run left another model: {', '.join(other + missing)} differ")
        print("the resumed run left the same model")


def write_functions(path: Path, options: argparse.Namespace) -> None:
    """`prompt` is a function's head and docstring, `completion` its body; such as fit into a sequence."""
    lines = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for prompt, completion in functions(file.read_text(errors="replace")):
            if len(prompt) + len(completion) < CHARACTERS * options.seq_len:
                lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    path.write_text("".join(lines[:NUM_FUNCTIONS]))


def functions(source: str) -> Iterator[tuple[str, str]]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            first = node.body[1].lineno - 1
            yield "".join(lines[node.lineno - 1 : first]), "".join(lines[first : node.end_lineno])


def train(root: Path, name: str, options: argparse.Namespace, stop_at: int | None = None) -> None:
    words = [
        *(f"model.path={options.model}", f'data.traces=["{root}/functions.jsonl"]'),
        *(f"data.seq_len={options.seq_len}", f"data.validation_documents={HELD_OUT}"),
        *(f"train.global_batch_size={options.batch}", f"train.micro_batch_size={options.batch}"),
        *(f"train.num_steps={options.steps}", f"train.validate_every={options.steps // 2}"),
        *(() if name == "lora" else ("model.base_quantization=nf4",)),
    ]
    submit = [sys.executable, "-m", "r1hpc.submit", "--run-name", name, "--run-root", str(root)]
    submit += ["--executor", "local", "--follow"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def follow(*more: str, stop_at: int | None = None) -> int:
        with subprocess.Popen(
            [*submit, *more], cwd=CHECKOUT, env=environment, stdout=subprocess.DEVNULL
        ) as process:
            watch(root / name, process, stop_at)
        return process.returncode

    status = follow(str(root / "job.yaml"), *words, stop_at=stop_at)
    if stop_at is not None:
        status = follow("--resume")
    if status:
        raise SystemExit(f"run {name} ended with status {status}: python -m r1hpc.status {root / name}")


def watch(run: Path, process: "subprocess.Popen[bytes]", stop_at: int | None) -> None:
    """Keep the largest memory of the run's processes in a file beside it; ask it to stop after a step."""
    file = run.with_suffix(".peak")
    peak = json.loads(file.read_text()) if file.exists() else 0
    while process.poll() is None:
        peak = max([peak, *resident(run)])
        if stop_at is not None and len(steps(run)) >= stop_at:
            (run / "STOP").touch()
            stop_at = None
        time.sleep(1.0)
    file.write_text(json.dumps(peak))


def resident(run: Path) -> Iterator[int]:
    """Bytes that each process of the run has held at most until now."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):
            if str(run) in (process / "cmdline").read_text(errors="replace"):
                lines = (process / "status").read_text().splitlines()
                yield next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def steps(run: Path) -> list[dict[str, float]]:
    path = run / "metrics" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read(run: Path) -> dict[str, object]:
    found = steps(run)
    held_out = [step["validation_loss"] for step in found if step.get("validation_loss") is not None]
    return {
        "steps": len(found),
        "loss of the last 50": round(statistics.mean(step["loss"] for step in found[-50:]), 4),
        "held out": [round(loss, 4) for loss in held_out],
        "seconds a step": round(statistics.median(step["step_time_s"] for step in found), 2),
        "peak MiB": json.loads(run.with_suffix(".peak").read_text()) // 2**20,
    }


if __name__ == "__main__":
    main()
