"""The test cluster behaves as the Slurm it stands for: nodes, GPUs, accounting, preemption, node failure."""

import sys
from pathlib import Path

import pytest

from tests.cluster import INTERFACE, Cluster, ClusterError
from tests.cluster.processes import until

pytestmark = pytest.mark.slurm

ALL_REDUCE = """
import datetime, os, sys
import torch
import torch.distributed as dist

rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
dist.init_process_group(
    "gloo", init_method=f"tcp://{sys.argv[1]}:29517", rank=rank, world_size=world,
    timeout=datetime.timedelta(seconds=40),
)
total = torch.tensor([2.0**rank])
dist.all_reduce(total)
print("sum", int(total.item()), "on", os.uname().nodename, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_four_nodes_are_idle_and_answer_with_their_own_names(idle_cluster: Cluster) -> None:
    names = ["r1n1", "r1n2", "r1n3", "r1n4"]
    assert idle_cluster.nodes() == dict.fromkeys(names, "idle")
    out = idle_cluster.run(["srun", "-N4", "hostname"]).stdout
    assert sorted(out.split()) == names


def test_a_task_sees_the_gpus_it_asked_for_and_no_more(idle_cluster: Cluster) -> None:
    show = ["bash", "-c", "echo ${CUDA_VISIBLE_DEVICES-none}"]
    assert idle_cluster.run(["srun", "-N2", "--gres=gpu:2", *show]).stdout.split() == ["0,1", "0,1"]
    assert idle_cluster.run(["srun", "-N1", *show]).stdout.split() == ["none"]
    with pytest.raises(ClusterError, match="configuration is not available"):
        idle_cluster.run(["srun", "-N1", "--gres=gpu:5", "true"])


def states_by_sacct(cluster: Cluster, job: int) -> list[str]:
    return [record["State"] for record in cluster.sacct(job)]


def test_accounting_counts_the_gpus_of_all_nodes(idle_cluster: Cluster) -> None:
    job = idle_cluster.submit("true", "-N4", "--gres=gpu:4", "--output=/dev/null")
    assert idle_cluster.wait_job(job) == "COMPLETED"
    until("COMPLETED by sacct", lambda: states_by_sacct(idle_cluster, job) == ["COMPLETED"], 60)
    (record,) = idle_cluster.sacct(job)
    assert "gres/gpu=16" in record["AllocTRES"].split(",")
    assert (record["State"], record["QOS"], record["Account"]) == ("COMPLETED", "normal", "research")


def test_an_urgent_job_evicts_a_scavenger_that_is_requeued(idle_cluster: Cluster, tmp_path: Path) -> None:
    victim = _scavenger(idle_cluster, tmp_path, "echo run $SLURM_RESTART_COUNT; srun sleep 600")
    preemptor = idle_cluster.preempt(victim)
    idle_cluster.wait_restarts(victim, 1)
    assert idle_cluster.wait_job(preemptor) == "COMPLETED"
    # slurmdbd and the job's first line may come a moment after slurmctld's word.
    until("PREEMPTED by sacct", lambda: states_by_sacct(idle_cluster, victim)[:1] == ["PREEMPTED"], 60)
    _wait_text(tmp_path / "out", "run 1", count=1)


def test_send_user_signal_delivers_the_users_signal_instead_of_sigterm(
    idle_cluster: Cluster, tmp_path: Path
) -> None:
    step = (
        "trap 'echo got USR2; exit 3' USR2; trap 'echo got TERM; exit 4' TERM; sleep 600 & echo armed; wait"
    )
    idle_cluster.set_user_signal(True)
    try:
        victim = _scavenger(idle_cluster, tmp_path, f'srun bash -c "{step}"', "--signal=USR2@60")
        said: list[str] = []
        # To a slurmd that is slow to answer slurmctld does not send it again (seen once in the suite).
        for life in range(1, 4):
            _wait_text(tmp_path / "out", "armed", count=2 * life)
            idle_cluster.preempt(victim)
            idle_cluster.wait_restarts(victim, life)
            said.append((tmp_path / "out").read_text().removeprefix("".join(said)))
            if said[-1].count("got USR2") == 2:
                break
    finally:
        idle_cluster.set_user_signal(False)
    assert said[-1].count("got USR2") == 2, said
    assert "got TERM" not in said[-1]


def test_a_crashed_node_is_recorded_as_node_fail_and_the_job_restarts(
    idle_cluster: Cluster, tmp_path: Path
) -> None:
    job = _scavenger(idle_cluster, tmp_path, "srun sleep 600")
    lost = idle_cluster.node_list(job)[1]
    idle_cluster.fail_node(lost)
    try:
        idle_cluster.wait_restarts(job, 1, timeout=80)
        # slurmdbd may hear of it a moment after slurmctld's word.
        wanted = ["NODE_FAIL", "RUNNING"]
        until("both by sacct", lambda: [r["State"] for r in idle_cluster.sacct(job)] == wanted, 40)
        assert lost not in idle_cluster.node_list(job)
    finally:
        idle_cluster.restore_node(lost)


def test_a_running_job_survives_a_restart_of_the_controller(idle_cluster: Cluster, tmp_path: Path) -> None:
    job = _scavenger(idle_cluster, tmp_path, "srun sleep 600")
    idle_cluster.stop_controller()
    with pytest.raises(ClusterError):
        idle_cluster.run(["squeue"], timeout=5)
    idle_cluster.start_controller()
    assert idle_cluster.job(job)["JobState"] == "RUNNING"
    assert idle_cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("num_nodes", [2, 4])
def test_gloo_reduces_across_the_nodes(idle_cluster: Cluster, tmp_path: Path, num_nodes: int) -> None:
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    done = idle_cluster.run(
        ["srun", f"-N{num_nodes}", "--nodelist=r1n1", sys.executable, str(script), "r1n1"],
        timeout=120,
        GLOO_SOCKET_IFNAME=INTERFACE,
        OMP_NUM_THREADS="1",
    )
    wanted = [f"sum {2**num_nodes - 1} on r1n{number}" for number in range(1, num_nodes + 1)]
    assert sorted(done.stdout.splitlines()) == wanted


def _scavenger(cluster: Cluster, tmp_path: Path, script: str, *options: str) -> int:
    """A running two-node job that may be evicted; its output is tmp_path/out."""
    job = cluster.submit(
        script,
        "--qos=scavenger",
        "--requeue",
        "-N2",
        "--gres=gpu:4",
        "--open-mode=append",
        f"--output={tmp_path}/out",
        *options,
    )
    cluster.wait_job(job, {"RUNNING"}, timeout=30)
    _wait_steps(cluster, job)
    return job


def _wait_steps(cluster: Cluster, job: int) -> None:
    def started() -> bool:
        return f"{job}.0" in cluster.run(["squeue", "--steps", "--noheader", "--format=%i"]).stdout.split()

    until(f"step 0 of job {job}", started, 20)


def _wait_text(file: Path, text: str, count: int) -> None:
    until(f"{count} times {text!r} in {file}", lambda: file.read_text().count(text) >= count, 40)
