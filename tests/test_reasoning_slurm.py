"""RL on a real Slurm, ended in every phase by SIGTERM or SIGKILL: the undisturbed run, to the bit.

pytest tests/test_reasoning_slurm.py        # about three minutes on two cores; two nodes, one rank each
pytest tests/test_reasoning_slurm.py -m soak                                   # PPO too
"""

from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from tests.cluster import Cluster
from tests.runs import submit, wait_over
from tests.train.test_rl_disturbed import (
    DISTURBANCES,
    GRPO,
    PPO,
    STOPPED,
    assert_little_was_lost,
    assert_same_learning,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
_WHERE = ("--executor", "slurm", "--nodes", "2", "resources.ranks_per_node=1", "-t", "20")


def _follow_through(
    cluster: Cluster, root: Path, name: str, algorithm: tuple[str, ...], **failpoints: str
) -> RunDir:
    job = submit(root, name, *algorithm, *_WHERE, job="jobs/rl_smoke.yaml", env=cluster.env(**failpoints))
    wait_over(job.run, 600)
    return job.run


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(GRPO, id="grpo"), pytest.param(PPO, id="ppo", marks=pytest.mark.soak)],
)
def test_ended_in_every_phase_it_is_the_same_run(
    tmp_path: Path, prompt_cluster: Cluster, algorithm: tuple[str, ...]
) -> None:
    quiet = _follow_through(prompt_cluster, tmp_path, "quiet", algorithm)
    run = _follow_through(
        prompt_cluster, tmp_path, "disturbed", algorithm, R1HPC_FAILPOINT=",".join(DISTURBANCES)
    )
    causes = [attempt.cause for attempt in read_history(run).attempts]
    expected = [Cause.preempted if n in STOPPED else Cause.crash for n in range(1, len(DISTURBANCES) + 1)]
    assert causes == [*expected, Cause.finished]
    assert_same_learning(run, quiet)
    assert_little_was_lost(run, STOPPED, save_every=4)
