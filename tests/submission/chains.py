"""Chains in tests: small files, submitted through the command a user takes.

path = write_chain(tmp_path, SMALL); done = submit(tmp_path, str(path), "--executor", "local")
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1hpc.submission.chain.folder import ChainDir
from tests.runs import CHECKOUT, run_environment

COMMON = """\
include: [model/tiny, stage/pretrain, deepspeed/zero1]
resources: {gpus_per_node: 0, ranks_per_node: 1, cpus_per_task: 1, time: "00:20:00"}
data: {recipe: smoke, seq_len: 64}
train: {num_steps: 6, global_batch_size: 4, micro_batch_size: 4, lr: 3e-3, warmup_steps: 2, precision: fp32}
checkpoint: {save_every: 2}
stages:
"""
THREE = """\
  - name: one
  - name: two
  - name: three
    needs: [one, two]
"""
# Demonstrations need no model: the quickest real stage.
TRACES = """\
task: {name: chain_sum}
generate: {num_items: 40, items_per_part: 10}
resources: {gpus_per_node: 0, ranks_per_node: 1, cpus_per_task: 1, time: "00:20:00"}
stages:
  - {name: one, stage: traces}
  - {name: two, stage: traces}
  - {name: three, stage: traces}
"""


def write_chain(root: Path, stages: str = THREE, common: str = COMMON) -> Path:
    """A chain file of pretraining stages."""
    path = root / "small.yaml"
    path.write_text(common + stages)
    return path


def submit(
    root: Path, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 180
) -> subprocess.CompletedProcess[str]:
    """`python -m r1hpc.submit WORDS --json`, whatever comes of it."""
    argv = [sys.executable, "-m", "r1hpc.submit", *words, "--run-root", str(root / "runs"), "--json"]
    return subprocess.run(
        argv, cwd=CHECKOUT, env=run_environment(env), capture_output=True, text=True, timeout=timeout_s
    )


def submitted(root: Path, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object of a submission that must succeed."""
    done = submit(root, *words, env=env)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def jobs_of(answer: Mapping[str, Any]) -> list[str | None]:
    return [stage["job_id"] for stage in answer["stages"]]


def actions_of(answer: Mapping[str, Any]) -> list[str]:
    return [stage["action"] for stage in answer["stages"]]


def write_attempt(chain: ChainDir, stage: str, job_id: str, cause: str | None) -> None:
    """What an attempt of a stage leaves behind: that it began, and how it ended where `cause` says so."""
    run = chain.stage(stage)
    events: Sequence[dict[str, Any]] = [
        {"event": "begin", "time": 2e9, "attempt": 1, "job_id": job_id, "node_names": ["n"], "ranks": 1},
        {"event": "end", "time": 2e9 + 1, "attempt": 1, "cause": cause, "requeued": False},
    ]
    with run.attempts.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in (events if cause else events[:1]))
    if cause == "finished":
        run.finished.write_text("{}")
