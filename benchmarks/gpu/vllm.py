"""Rollouts by vLLM: in an environment of its own, since it wants a torch and a transformers of its own.

    python -m venv runs/gpu/vllm && runs/gpu/vllm/bin/pip install -e '.[vllm]'

The piece makes it where it is not there, for which the machine must reach a package index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.place import CHECKOUT, PieceError, Place, finished, median
from benchmarks.gpu.table import Table, number, seconds
from r1hpc.api import Run

_INSTALL_S = 420


def run(place: Place) -> list[Table]:
    if place.is_small:
        raise PieceError("vLLM needs a GPU: in small there is nothing to see")
    python = _environment(place.folder.parent / "vllm")
    rows = tuple(_row(place, python, engine) for engine in ("sampler", "vllm"))
    header = ("rollout.engine", "log-probability difference", "rollout", "update")
    notes = (
        "rl_smoke on one GPU, bf16, 10 steps; between rollouts vLLM sleeps, and its cache is given back.",
    )
    return [Table("Rollouts by vLLM", header, rows, notes)]


def _environment(folder: Path) -> Path:
    """Its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if subprocess.run([str(python), "-c", "import vllm, r1hpc"], capture_output=True, check=False).returncode:
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--editable", f"{CHECKOUT}[vllm]"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_INSTALL_S,
            env={**os.environ, "DS_BUILD_OPS": "0"},
        )
        if done.returncode:
            raise PieceError(f"vLLM could not be installed into {folder}: {done.stderr[-600:]}")
    return python


def _row(place: Place, python: Path, engine: str) -> tuple[str, ...]:
    argv = [str(python), "-m", "r1hpc.submit", "rl_smoke", "--executor", "local", "--json"]
    number_of = len(list(place.folder.glob(f"vllm-{engine}.*"))) + 1
    argv += ["--run-root", str(place.folder), "--run-name", f"vllm-{engine}.{number_of}"]
    argv += [
        "resources.gpus_per_node=1",
        f"rollout.engine={engine}",
        "train.num_steps=10",
        "train.precision=bf16",
    ]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PieceError(f"submit: {done.stderr[-600:]}")
    made = finished(Run(json.loads(done.stdout)["run_dir"]))
    times = (seconds(median(made, "rollout_time_s")), seconds(median(made, "update_time_s")))
    return engine, number(median(made, "logprob_difference")), *times
