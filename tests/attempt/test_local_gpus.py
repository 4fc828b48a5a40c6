"""Nodes played on one machine have each their own of its GPUs."""

from r1hpc.attempt.local import gpus_of_played_node
from r1hpc.config.schema.cluster import ResourcesConfig


def visible(nodes: int, gpus: int, environ: dict[str, str]) -> list[str | None]:
    resources = ResourcesConfig(nodes=nodes, gpus_per_node=gpus)
    ranks = range(nodes * max(gpus, 1))
    return [gpus_of_played_node(resources, rank, environ).get("CUDA_VISIBLE_DEVICES") for rank in ranks]


def test_each_played_node_sees_its_own() -> None:
    assert visible(2, 2, {}) == ["0,1", "0,1", "2,3", "2,3"]
    assert visible(2, 1, {"CUDA_VISIBLE_DEVICES": "5,7"}) == ["5", "7"]


def test_one_node_and_cpu_ranks_see_what_the_shell_sees() -> None:
    assert visible(1, 2, {}) == [None, None]
    assert visible(2, 0, {}) == [None, None]
