"""Fifty preemptions in a row on a real Slurm, a third in start-up: no hold, nothing lost, no disk filled up.

pytest tests/test_many_preemptions_slurm.py -m soak        # about a quarter of an hour on two quiet cores
"""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import read_steps
from tests.cluster import Cluster
from tests.runs import (
    Submitted,
    assert_same_run,
    current_step,
    submit,
    wait_attempt,
    wait_over,
    wait_step,
    wait_until,
)

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(3600)]

_SEED = int(os.environ.get("R1HPC_SEED", "20240229"))
_KEEP = 2
_SIZE = ("--nodes", "1", "train.num_steps=300", "train.global_batch_size=4")
_SAVES = ("checkpoint.save_every=25", f"checkpoint.keep={_KEEP}")
_MANIFEST_BYTES = 64 << 10
"""Manifests, folders and tombstones beside the files of checkpoints."""


def test_fifty_preemptions_in_a_row(tmp_path: Path, idle_cluster: Cluster) -> None:
    quiet = submit(tmp_path, "quiet", *_SIZE, *_SAVES).run
    job = submit_slow(tmp_path, idle_cluster)
    with disk_watched(job.run) as most:
        preempt_again_and_again(job, idle_cluster, 50)
        wait_over(job.run, 300)
    wait_over(quiet)
    check(job.run, quiet, 50, max(most))


def submit_slow(root: Path, cluster: Cluster, *words: str) -> Submitted:
    where = ("--executor", "slurm", "--qos", "scavenger", "-t", "60")
    slow = cluster.env(R1HPC_FAILPOINT="step.begin:sleep=0.2::*")
    return submit(root, "preempted", *where, *_SIZE, *_SAVES, *words, env=slow)


def preempt_again_and_again(job: Submitted, cluster: Cluster, times: int) -> None:
    run, job_id = job.run, int(job.job_id)
    chance = random.Random(_SEED)
    begun = len(read_history(run).attempts)
    for attempt in range(begun + 1, begun + times + 1):
        wait_attempt(run, attempt)
        if chance.random() < 2 / 3:
            wait_step(run, current_step(run) + chance.randint(1, 3))
        wait_until("the job to run", lambda: cluster.state(job_id) == "RUNNING", 60, run)
        cluster.preempt(job_id)


@contextmanager
def disk_watched(run: RunDir) -> Iterator[list[int]]:
    """Collects how many bytes lie below the run's checkpoints, twenty times a second."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(bytes_below(run.checkpoints))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def bytes_below(folder: Path) -> int:
    """Each file once, also where a folder is renamed meanwhile."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))  # noqa: PTH118
            except OSError:
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def check(run: RunDir, quiet: RunDir, times: int, most_bytes: int) -> None:
    attempts = read_history(run).attempts
    assert [a.cause for a in attempts] == [Cause.preempted] * times + [Cause.finished]
    assert len({a.job_id for a in attempts}) == 1
    assert not read_steps(run).lost
    for before, after in pairwise(attempts):
        assert (before.last_step or before.resumed_from) == after.resumed_from, before
    largest = max(found.manifest.total_size for found in CheckpointStore(run.checkpoints).list())
    in_start_up = sum(a.last_step is None for a in attempts)
    print(f"{in_start_up} of {times} in start-up; at most {most_bytes / largest:.2f} checkpoints on disk")
    assert in_start_up > 0
    assert most_bytes <= (_KEEP + 1) * largest + _MANIFEST_BYTES
    assert_same_run(run, quiet)
