"""What a run leaves open is settled from the profile, the cluster or a stated assumption."""

import dataclasses
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.defaults import choose_executor, decide, num_visible_gpus
from r1hpc.slurm.probe import ClusterFacts

FACTS = ClusterFacts(
    partition="gpu",
    preempt_type="preempt/qos",
    preempt_mode="REQUEUE",
    grace_s=120,
    kill_wait_s=30,
    sends_user_signal=False,
    job_requeue=True,
    max_batch_requeue=5,
    max_time_s=86400,
    gpus_per_node=4,
)


def train(*overrides: str) -> RunConfig:
    return load.load("train", ["resources.time=null", *overrides])


def gpus_of(config: RunConfig, facts: ClusterFacts) -> int | None:
    return decide(config, "slurm", facts=facts).config.resources.gpus_per_node


def test_the_cluster_fills_what_is_open_and_it_is_said() -> None:
    decision = decide(train(), "slurm", facts=FACTS)
    assert decision.config.resources.gpus_per_node == 4
    assert decision.config.resources.time == "1-00:00:00"
    assert decision.plan.gpu_hours_ceiling == 4 * 4 * 24
    assert decision.config.resources.signal_lead_s is not None
    assert "time: 1-00:00:00, the limit of partition gpu" in decision.notes


@pytest.mark.parametrize("asked", ["resources.gpus_per_node=2", "cluster.gpus_per_node=2"])
def test_what_is_written_wins_over_the_cluster(asked: str) -> None:
    assert gpus_of(train(asked), FACTS) == 2


@pytest.mark.parametrize(
    ("words", "there", "said"),
    [
        ((), 0, "nodes of partition gpu have no GPU: name one that has"),
        (
            ("cluster.gpus_per_node=0",),
            4,
            "the profile says gpus_per_node: 0, and nodes of partition gpu have 4",
        ),
    ],
)
def test_a_job_becomes_no_cpu_run_by_itself(words: tuple[str, ...], there: int, said: str) -> None:
    facts = dataclasses.replace(FACTS, gpus_per_node=there)
    with pytest.raises(UsageError, match=said):
        decide(train(*words), "slurm", facts=facts)
    assert gpus_of(train(*words, "resources.gpus_per_node=0"), facts) == 0
    traces = load.load(None, ["stage=traces", *words])
    assert gpus_of(traces, facts) == 0, "it needs none"
    no_gpus = dataclasses.replace(FACTS, gpus_per_node=0)
    assert gpus_of(train("cluster.gpus_per_node=0"), no_gpus) == 0


def test_a_job_that_has_its_nodes_is_not_held_against_the_partition() -> None:
    config = train("resources.time=2-00:00:00")
    with pytest.raises(UsageError, match="more than partition gpu allows"):
        decide(config, "slurm", facts=FACTS)
    assert decide(config, "slurm", facts=FACTS, has_nodes=True).config.resources.time == "2-00:00:00"


def test_whole_nodes_with_more_gpus_than_are_asked_for_are_noted() -> None:
    def notes(*words: str) -> str:
        return " ".join(decide(train(*words), "slurm", facts=FACTS).notes)

    two, whole = "resources.gpus_per_node=2", "resources.exclusive=true"
    assert "whole nodes (exclusive) have 4 GPUs each and are charged for them" in notes(two, whole)
    assert "whole nodes" not in notes(two, "resources.exclusive=false")
    assert "whole nodes" not in notes(whole)


def test_the_warning_window_is_told() -> None:
    notes = " ".join(decide(train("model.config.vocab_size=32000"), "slurm", facts=FACTS).notes)
    assert "GraceTime" in notes
    assert "120 s" in notes
    assert "a save is expected to take" in notes


def test_nobody_knows_how_many_gpus() -> None:
    with pytest.raises(UsageError, match="--gpus-per-node N"):
        decide(train(), "slurm", facts=ClusterFacts())
    decision = decide(train(), "slurm", facts=ClusterFacts(), assumed_gpus_per_node=8)
    assert decision.config.resources.gpus_per_node == 8
    assert any("assumed 8" in note for note in decision.notes)


def test_more_time_than_the_partition_has_is_refused() -> None:
    with pytest.raises(UsageError, match="more than partition gpu allows"):
        decide(train('resources.time="2-00:00:00"'), "slurm", facts=FACTS)


@pytest.mark.parametrize(("partition", "is_routed"), [("gpu,long", False), (None, True)])
def test_another_partition_may_allow_more_time(partition: str | None, is_routed: bool) -> None:
    """One of several, or the one that the site's plugin chooses where none is named."""
    facts = dataclasses.replace(FACTS, is_routed=is_routed)
    where = [f'resources.partition="{partition}"'] if partition else []
    decision = decide(train('resources.time="2-00:00:00"', *where), "slurm", facts=facts)
    assert decision.config.resources.time == "2-00:00:00"
    assert any("unless another partition takes it" in note for note in decision.notes)


def test_the_least_of_what_limits_a_job_is_its_time() -> None:
    """A job that asks for more than its QOS allows waits for ever; Slurm would not have asked for so much."""
    short = dataclasses.replace(FACTS, max_wall_s=3600)
    assert decide(train(), "slurm", facts=short).config.resources.time == "01:00:00"
    long = dataclasses.replace(FACTS, max_wall_s=10**6)
    assert "time: 1-00:00:00, the limit of partition gpu" in decide(train(), "slurm", facts=long).notes
    several = decide(train('resources.partition="gpu,long"'), "slurm", facts=FACTS)
    assert several.config.resources.time is None, "each has its own"


def test_more_nodes_than_the_partition_has_are_refused() -> None:
    facts = dataclasses.replace(FACTS, num_nodes=3)
    asked = decide(train("resources.nodes=4", "resources.partition=gpu"), "slurm", facts=facts)
    with pytest.raises(UsageError, match="--nodes 4 is more than the 3 of partition gpu"):
        asked.refuse_missing_nodes()
    decide(train("resources.nodes=2"), "slurm", facts=facts).refuse_missing_nodes()
    with pytest.raises(ConfigError, match=r"Legal .* are: 2 nodes") as refused:
        decide(train("resources.nodes=3"), "slurm", facts=facts)
    assert "4 nodes" not in str(refused.value)


def test_a_local_run_is_not_told_to_take_more_nodes() -> None:
    words = ["model.config.vocab_size=32000", "model.config.hidden_size=3584", "resources.nodes=1"]
    words += ["resources.gpus_per_node=1", "cluster.gpu_type=v100-32gb", "train.precision=fp16"]

    def way_out(executor: str) -> str:
        memory = decide(train(*words), executor, facts=FACTS, assumed_gpus_per_node=4).plan.memory
        assert memory is not None
        assert memory.way_out
        return memory.way_out

    assert "resources.nodes=2" in way_out("slurm")
    assert "nodes" not in way_out("local")


@pytest.mark.parametrize("lead", [0, 3600])
def test_a_warning_must_come_within_the_time(lead: int) -> None:
    with pytest.raises(UsageError, match="signal_lead_s"):
        decide(train('resources.time="1:00:00"', f"resources.signal_lead_s={lead}"), "slurm", facts=FACTS)


def test_auto_is_local_only_where_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    executor, notes = choose_executor("auto", will_submit=True)
    assert (executor, len(notes)) == ("local", 1)
    assert choose_executor("auto", will_submit=False) == ("slurm", [])
    with pytest.raises(UsageError, match="sbatch is not on PATH"):
        choose_executor("slurm", will_submit=True)


@pytest.mark.parametrize(
    ("answer", "executor"),
    [
        ("exit 0", "slurm"),
        ("echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1", "local"),
        ("sleep 6; echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1", "local"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "slurm"),
    ],
)
def test_a_client_without_a_cluster_is_no_slurm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, executor: str
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\n{answer}\n")
    sbatch.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert choose_executor("auto", will_submit=True)[0] == executor


@pytest.mark.parametrize(
    ("listed", "num"),
    [(None, 4), ("", 0), ("1,3", 2), ("0,0", 1), ("0,9,1", 1), ("-1", 0), ("GPU-aa,MIG-1", 2), ("x", 0)],
)
def test_only_visible_gpus_of_this_machine_count(listed: str | None, num: int) -> None:
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert num_visible_gpus(4, environ) == num
