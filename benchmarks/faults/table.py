"""Measure what a job lost, beside the same job undisturbed, and print the table."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.arms import CHECKOUT, LEGEND, Job
from benchmarks.faults.jobs.small import SAVE_EVERY, STEPS
from benchmarks.faults.kinds import FAULTS

_COLUMNS = {
    "lost": "steps lost",
    "repeated": "steps repeated",
    "false_causes": "false causes",
    "difference": "difference to the twin",
}
_NOTES = f"""
Steps lost: steps of work after the last checkpoint that were done again or, in a dead run, never done
(counted from its last save, each {SAVE_EVERY} steps). A dash: no cause stated, or the run did not finish."""


def twin_of(out: Path, arm: str) -> Path:
    """Return the last weights of an arm's job that ran without Slurm and without a fault."""
    log = out / "twins" / arm / "log"
    if not (log / "weights.pt").exists():
        module = "plain" if arm in ("submitit", "wrapper") else arm  # they call the same function
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        env |= {"FAULTS_LOG": str(log), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", f"benchmarks.faults.jobs.by_{module}", str(log.with_name("out"))]
        subprocess.run(command, cwd=CHECKOUT, env=env, check=True)
    return log / "weights.pt"


def measured(job: Job, true: str, causes: Sequence[str], out: Path) -> dict[str, Any]:
    """Count what the job lost."""
    steps = job.steps()
    weights = job.log / "weights.pt"
    dead = not weights.exists()
    repeated = len(steps) - len(set(steps))
    never = max(steps, default=0) % SAVE_EVERY if dead else STEPS - len(set(steps))
    false = sum(not re.search(true, cause) for cause in causes) if causes else None
    difference = None
    if not dead:
        ours, theirs = (torch.load(path, weights_only=True) for path in (weights, twin_of(out, job.arm)))
        difference = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    row = {"dead": dead, "lost": repeated + never, "repeated": repeated, "false_causes": false}
    return {**row, "difference": difference, "causes": causes}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table: a line for each fault and arm, its seeds separated by commas."""
    titles = ["fault", "arm", "dead", *_COLUMNS.values()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, fault in FAULTS.items():
        for arm, legend in LEGEND.items():
            cells = [row for row in rows if (row["fault"], row["arm"]) == (name, arm)]
            if cells:
                dead = f"{sum(row['dead'] for row in cells)} of {len(cells)}"
                counts = (", ".join(_short(row[key]) for row in cells) for key in _COLUMNS)
                lines.append(f"| {fault.title} | {legend} | {dead} | {' | '.join(counts)} |")
    return "\n".join([*lines, _NOTES])


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value else "0"
