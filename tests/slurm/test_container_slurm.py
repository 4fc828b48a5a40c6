"""Ranks in a container and GPUs by type, on a real Slurm; the runtime is a script that notes its words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.cluster import Cluster
from tests.runs import submit, wait_over

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_ranks_run_in_a_container_and_gpus_are_had_by_type(tmp_path: Path, idle_cluster: Cluster) -> None:
    """On CPUs to the end; on GPUs until the rank finds no card behind the test cluster's device files."""
    runtime, image = tmp_path / "bin" / "apptainer", tmp_path / "image.sif"
    image.touch()
    runtime.parent.mkdir()
    shift = f'until [ "$1" = {image} ]; do shift; done; shift 2'
    runtime.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/words\n{shift}\nexec {sys.executable} "$@"\n')
    runtime.chmod(0o755)
    profile = tmp_path / "site.yaml"
    profile.write_text(f"container: {{image: {image}}}\nsetup: ['export PATH={runtime.parent}:$PATH']\n")
    words = (
        "--executor",
        "slurm",
        "--cluster",
        str(profile),
        "-t",
        "10",
        "--nodes",
        "1",
        "train.num_steps=2",
    )
    runs, env = tmp_path / "runs", idle_cluster.env()
    on_cpus = submit(runs, "cpus", *words, job="jobs/smoke.yaml", env=env)
    typed = ("--gpus-per-node", "a100:1", "limits.max_crashes=0")
    on_gpus = submit(runs, "gpus", *words, *typed, job="jobs/smoke.yaml", env=env)
    for job in (on_cpus, on_gpus):
        wait_over(job.run, 120)
    assert read_history(on_cpus.run).attempts[-1].cause is Cause.finished
    begun = sorted(line.partition(" -u -m r1hpc.launch rank")[0] for line in _lines(tmp_path / "words"))
    assert begun[0] == f"exec --bind {runs} {image} python3"
    assert set(begun[1:]) == {f"exec --nv --bind {runs} {image} python3"}
    asked = ["sacct", "-j", str(on_gpus.job_id), "-nX", "-o", "AllocTRES%80"]
    said = subprocess.run(asked, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout
    assert "gres/gpu:a100=1" in said


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
