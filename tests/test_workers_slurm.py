"""Rollout workers in the scavenger queue of a real Slurm: preempted and killed, each item counts once.

pytest tests/test_workers_slurm.py        # two minutes on two cores; a trainer and two workers, a node each
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.train.exchange.mailbox import read_beat, read_boxes
from tests.cluster import Cluster
from tests.runs import Submitted, held, submit, wait_attempt, wait_over, wait_until
from tests.train.test_rl_disturbed import weights_of
from tests.train.test_worker_runs import NUM_ITEMS, NUM_ROLLOUTS, WORDS, records

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

SLURM = ("--executor", "slurm", "-t", "20", "resources.exclusive=true")
TRAINER = (*WORDS, "workers.patience_s=100", "workers.silence_s=5")
WORKERS = ("one", "two")


def start(cluster: Cluster, root: Path, name: str, job: str, *words: str, failpoint: str = "") -> Submitted:
    return submit(
        root, name, *SLURM, *words, job=f"jobs/{job}.yaml", env=cluster.env(R1HPC_FAILPOINT=failpoint)
    )


def has_delivered(trainer: RunDir, worker: str, attempt: int) -> bool:
    """True if this attempt of a worker has committed a group; `committed` counts earlier ones' too."""
    beats = [read_beat(box) for box in read_boxes(trainer.workers / worker)]
    counts = [0, *(beat["committed"] for beat in beats if beat is not None)]
    return len(counts) == attempt + 1 and counts[-1] > counts[-2]


def causes(runs: Sequence[RunDir]) -> list[list[Cause | None]]:
    return [[attempt.cause for attempt in read_history(run).attempts] for run in runs]


def test_workers_that_are_preempted_and_killed_cost_no_item(prompt_cluster: Cluster, tmp_path: Path) -> None:
    cluster, root = prompt_cluster, tmp_path
    first, second = root / "preempted", root / "killed"
    stops = f"{held(first, 2, rank=0)},{held(second, 6, rank=0)}"
    trainer = start(cluster, root, "trainer", "rl_smoke", *TRAINER, failpoint=stops).run
    where = (f"workers.trainer={trainer.path}", "resources.gpus_per_node=0", "--qos", "scavenger")
    jobs = [start(cluster, root, name, "rollout", *where) for name in WORKERS]
    workers = [job.run for job in jobs]
    wait_until(
        "groups of both", lambda: all(has_delivered(trainer, name, 1) for name in WORKERS), 120, trainer
    )
    for job in jobs:
        cluster.preempt(int(job.job_id))
    for worker in workers:
        wait_attempt(worker, 2, 120)
    first.touch()
    wait_until("a group of the second attempt", lambda: has_delivered(trainer, "one", 2), 120, trainer)
    cluster.run(["scancel", "--signal=KILL", f"{jobs[0].job_id}.0"])
    second.touch()
    for run in (trainer, *workers):
        wait_over(run)

    ends = [
        [Cause.finished],
        [Cause.preempted, Cause.crash, Cause.finished],
        [Cause.preempted, Cause.finished],
    ]
    assert causes([trainer, *workers]) == ends
    lines = records(trainer)
    sampled = [tuple(pair) for record in lines for pair in record["groups"]]
    assert [item for item, _ in sampled] == list(range(NUM_ROLLOUTS * NUM_ITEMS))
    assert {worker for _, worker in sampled} == set(WORKERS)
    assert 0 < max(record["staleness_max"] for record in lines) <= 2
    replay = submit(root, "replay", *WORDS, f"rl.replay={trainer.path}", job="jobs/rl_smoke.yaml").run
    wait_over(replay)
    assert weights_of(replay) == weights_of(trainer)
