"""What is read from the cluster's own words; recorded from Slurm 24.11.5, shortened."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.slurm.probe import ClusterFacts, probe_cluster, read_config, read_gpus, read_partition

CONFIG = """Configuration data as of 1795568475
JobRequeue              = 1
KillWait                = 30 sec
MaxBatchRequeue         = 5
PreemptMode             = REQUEUE
PreemptParameters       = (null)
PreemptType             = preempt/qos
ProctrackType           = proctrack/cgroup
SLURM_VERSION           = 24.11.5
"""
PARTITIONS = (
    "PartitionName=main Default=YES DefaultTime=00:30:00 GraceTime=0 MaxTime=2-00:00:00 PreemptMode=REQUEUE"
    " TotalCPUs=768 TotalNodes=6\n"
    "PartitionName=debug Default=NO DefaultTime=NONE GraceTime=90 MaxTime=UNLIMITED PreemptMode=CANCEL\n"
)
QOS = "normal|00:00:00|cluster|\nscavenger|00:02:00|requeue|\nurgent|00:00:00|cluster|scavenger\n"
NODES = "main|4|gpu:a100:8(S:0-1),nvme:1\nmain|2|gpu:a100:4\ndebug|1|(null)\n"


Commands = tuple[dict[str, str], Callable[[], None], Path]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Slurm's commands as small programs that print what was recorded; change `texts` to change it."""
    texts = {
        "config": CONFIG,
        "partition": PARTITIONS,
        "qos": QOS,
        "assoc": "|normal,scavenger||lab||near\n",
        "sinfo": NODES,
    }
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write() -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text)
        for name, word in (("scontrol", "$2"), ("sacctmgr", "$3"), ("sinfo", "sinfo")):
            (tmp_path / name).write_text(f"#!/bin/bash\nexec cat {tmp_path}/{word}.txt\n")
            (tmp_path / name).chmod(0o700)

    write()
    return texts, write, tmp_path


def test_the_facts_of_a_preemptible_qos(commands: Commands) -> None:
    facts = probe_cluster(qos="scavenger")
    assert (facts.preempt_mode, facts.grace_s, facts.kill_wait_s) == ("REQUEUE", 120, 30)
    assert (facts.gpus_per_node, facts.gpu_type) == (8, "a100")
    counted = [probe_cluster(partition=name).num_nodes for name in ("main", "main,debug", None)]
    assert counted == [6, None, None]
    assert (facts.job_requeue, facts.max_batch_requeue, facts.sends_user_signal) == (True, 5, False)
    assert facts.preemptors == (), "urgent is not the user's"
    assert (facts.version, facts.unknown) == ("24.11.5", ())


def test_a_qos_that_nobody_may_preempt(commands: Commands) -> None:
    facts = probe_cluster(qos="normal")
    assert (facts.preempt_mode, facts.grace_s) == ("OFF", 0)


def test_the_users_default_qos_is_taken(commands: Commands) -> None:
    texts, write, _ = commands
    texts["assoc"] = "scavenger|normal,scavenger,urgent||lab||near\n"
    write()
    assert probe_cluster().preemptors == (("urgent", "scavenger"),)
    assert probe_cluster().qos == "scavenger"


@pytest.mark.parametrize(
    ("associations", "qos"),
    [
        ("urgent|urgent||lab||far\nscavenger|normal,scavenger||lab||near\n", "scavenger"),
        ("urgent|urgent||lab||far\n", None),
        ("normal|normal||lab||near\nscavenger|scavenger||other||near\n", None),
        ("normal|normal||lab||near\n|normal,scavenger||other||near\n", None),
        ("normal|normal||lab||near\n|normal||other||near\n", "normal"),  # whichever is charged
        ("normal|normal||lab||near\nurgent|urgent||lab|debug|near\n", "normal"),
    ],
)
def test_the_default_qos_is_this_clusters_and_of_the_account_that_is_charged(
    commands: Commands, associations: str, qos: str | None
) -> None:
    texts, write, _ = commands
    texts["config"] = CONFIG + "ClusterName = near\n"
    texts["assoc"] = associations
    write()
    assert probe_cluster().qos == qos


def test_preemption_by_partition(commands: Commands) -> None:
    texts, write, _ = commands
    texts["config"] = CONFIG.replace("preempt/qos", "preempt/partition_prio").replace(
        "(null)", "send_user_signal"
    )
    write()
    facts = probe_cluster(partition="debug")
    assert (facts.preempt_mode, facts.grace_s, facts.sends_user_signal) == ("CANCEL", 90, True)
    assert (facts.max_time_s, facts.gpus_per_node) == (None, 0)


def test_the_wall_limit_of_a_qos_or_of_the_user(commands: Commands) -> None:
    texts, write, _ = commands
    texts["config"] = CONFIG + "ClusterName = near\n"
    texts["qos"] = (
        "normal|00:00:00|cluster||2-00:00:00|DenyOnLimit\n"
        "long|00:00:00|cluster|||PartitionTimeLimit\nplain|00:00:00|cluster|||\n"
    )
    lab = "normal|normal,long,plain|1-00:00:00|lab||near\n"
    texts["assoc"] = f"{lab}normal|normal|00:30:00|lab|debug|near\nnormal|normal|00:10:00|lab||far\n"
    write()
    assert (probe_cluster().max_wall_s, probe_cluster().max_time_s) == (2 * 86400, 2 * 86400)
    longest = probe_cluster(qos="long")
    assert (longest.max_wall_s, longest.max_time_s) == (86400, None), "the QOS goes before the partition"
    assert probe_cluster(qos="plain", partition="debug").max_wall_s == 1800
    texts["assoc"] += "normal|plain|00:20:00|other||near\n"
    write()
    assert probe_cluster(qos="plain").max_wall_s is None, "which account will be charged is not known"


def test_a_failed_probe_is_unknown_and_named(commands: Commands) -> None:
    _, _, folder = commands
    (folder / "sacctmgr").write_text("#!/bin/bash\necho 'Connection refused' >&2\nexit 1\n")
    facts = probe_cluster(qos="scavenger")
    assert facts.grace_s is None
    assert facts.gpus_per_node == 8
    assert len(facts.unknown) == 2
    assert "Connection refused" in facts.unknown[0]


def test_without_slurm_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = probe_cluster()
    assert facts.reachable is False
    assert len(facts.unknown) == 5
    assert facts == ClusterFacts(unknown=facts.unknown)


def test_an_unknown_partition_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="no partition 'mian'; there are: main, debug"):
        read_partition(PARTITIONS, "mian")


def test_gpus_of_most_nodes_are_taken() -> None:
    assert read_gpus(NODES, "main") == (8, "a100")
    assert read_gpus("gpu|3|gpu:4\n", "gpu") == (4, None)
    assert read_gpus("gpu|3|gpu:a100_3g.40gb:8,gpu:a100:2\n", "gpu") == (10, "a100_3g.40gb")
    assert read_gpus("gpu|3|gpu:3090:4(S:0-1),gpu:2080ti:2\n", "gpu") == (6, "3090")
    assert read_gpus(None, "gpu") == (None, None)


def test_nodes_without_gpus_do_not_hide_those_that_have_some() -> None:
    assert read_gpus("all|100|(null)\nall|10|gpu:a100:4\n", "all") == (4, "a100")
    assert read_gpus("all|100|(null)\n", "all") == (0, None)


def test_configuration_lines() -> None:
    assert read_config(CONFIG)["KillWait"] == "30 sec"
