"""The card that a run asks Slurm for is the one that is planned for."""

from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config import load
from r1hpc.config.schema.cluster import ClusterConfig, ResourcesConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.hours.estimate_run import estimate_of_run
from r1hpc.plan.run import make_plan
from r1hpc.plan.topology.checks import check_precision
from r1hpc.plan.topology.gpus import UnknownGpuError, gpu_type_of
from r1hpc.submission.estimate import estimate_job
from tests.plan.test_run_memory import QWEN_7B


def of(asked: str | None, usual: str | None) -> RunConfig:
    return RunConfig(resources=ResourcesConfig(gpu_type=asked), cluster=ClusterConfig(gpu_type=usual))


@pytest.mark.parametrize(
    ("asked", "usual", "expected"),
    [
        (None, None, None),
        (None, "a100-40gb", "a100-40gb"),
        ("h100", None, "h100"),
        ("h100", "a100-80gb", "h100"),
        ("a100", "a100-40gb", "a100-40gb"),  # which says more of the same card
        ("a100_80gb", "a100-40gb", "a100_80gb"),
        ("nvidia_h100_pcie", "h100-sxm-80gb", "nvidia_h100_pcie"),
        ("big", "a100-40gb", "a100-40gb"),  # a site's own name
        ("h100_1g.10gb", "h100", "h100_1g.10gb"),
        ("h100", "own-name", "h100"),
    ],
)
def test_what_is_asked_of_slurm_goes_first_where_it_is_a_card(
    asked: str | None, usual: str | None, expected: str | None
) -> None:
    assert gpu_type_of(of(asked, usual)) == expected


def run(*words: str) -> Any:
    model = f"model.config={QWEN_7B}".replace("'", "")
    config = load.load("train", [model, "data.seq_len=2048", *words])
    return config, make_plan(config, gpus_per_node=8)


def test_memory_hours_and_precision_are_of_that_card() -> None:
    zero = ["deepspeed.zero_stage=2"]
    small, plan = run("resources.gpu_type=v100_16gb", "cluster.gpu_type=a100-80gb", *zero)
    assert gpu_type_of(small) == "v100_16gb"
    assert plan.memory.way_out, "which would fit the cluster's 80 GB"
    assert not run("cluster.gpu_type=a100-80gb", *zero)[1].memory.way_out
    hours = []
    for words in (["resources.gpu_type=h100"], ["cluster.gpu_type=h100"], []):
        found = estimate_of_run(*run(*words))
        assert found is not None
        assert found.assumptions["gpu_given"] is bool(words)
        assert found.gpu_hours is not None
        hours.append(found.gpu_hours.p50)
    assert hours[0] == hours[1] != hours[2]
    with pytest.raises(UnknownGpuError, match="slice"):
        estimate_of_run(*run("resources.gpu_type=h100_1g.10gb", "cluster.gpu_type=h100"))
    words = ["resources.gpu_type=a100", "cluster.gpu_type=h100", "resources.gpus_per_node=8"]
    fp8, _ = run(*words, "train.precision=fp8")
    with pytest.raises(UsageError, match="A100-SXM4-80GB has no FP8"):
        check_precision(fp8)


def test_an_estimate_for_elsewhere_is_of_the_card_that_it_is_given() -> None:
    words = ("resources.gpus_per_node=8", "resources.gpu_type=v100", "train.precision=bf16")
    found = estimate_job("train", words, gpu="h100")
    assert found.assumptions["gpu"] == "H100-SXM-80GB"
