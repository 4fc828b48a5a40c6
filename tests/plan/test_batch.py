"""The global batch comes out exactly, or the error says what would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import ConfigError
from r1hpc.config.load import load
from r1hpc.plan.topology.batch import (
    BatchPlan,
    Topology,
    batch_of,
    legal_topologies,
    solve_batch,
    updates_per_rollout,
)

_counts = st.integers(1, 24)


@given(nodes=_counts, ranks=st.integers(1, 8), micro=_counts, accumulation=_counts)
def test_a_product_is_solved_back(nodes: int, ranks: int, micro: int, accumulation: int) -> None:
    batch = nodes * ranks * micro * accumulation
    expected = BatchPlan(batch, micro, accumulation)
    assert solve_batch(batch, micro, nodes * ranks) == expected
    assert solve_batch(batch, micro, nodes * ranks, accumulation, ranks) == expected


@given(batch=st.integers(1, 600), nodes=_counts, ranks=st.integers(1, 8), micro=_counts)
def test_solved_or_refused_with_legal_choices(batch: int, nodes: int, ranks: int, micro: int) -> None:
    try:
        plan = solve_batch(batch, micro, nodes * ranks, None, ranks)
    except ConfigError as error:
        assert batch % (nodes * ranks * micro)
        legal = legal_topologies(batch, ranks, max(2 * nodes, nodes + 4))
        listed = [f"{n} node{'s' if n > 1 else ''}, micro batch {m}, accumulation {a}" for n, m, a in legal]
        shown = [choice for choice in listed if f"{choice};" in f"{error};"]
        assert len(shown) == min(8, len(legal))
    else:
        assert plan.global_batch_size == batch
        assert nodes * ranks * plan.micro_batch_size * plan.gradient_accumulation_steps == batch


@given(batch=st.integers(1, 200), ranks=st.integers(1, 8), max_nodes=st.integers(1, 12))
def test_legal_topologies_are_all_and_only_the_legal_ones(batch: int, ranks: int, max_nodes: int) -> None:
    expected = [
        (nodes, micro, batch // (nodes * ranks * micro))
        for nodes in range(1, max_nodes + 1)
        for micro in range(1, batch + 1)
        if batch % (nodes * ranks * micro) == 0
    ]
    assert legal_topologies(batch, ranks, max_nodes) == expected


def test_a_given_accumulation_that_disagrees_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is 32, but 4 ranks x .* 2 x .*steps 3 is 24\. .*accumulation 4"):
        solve_batch(32, 2, 4, 3)


def test_the_nearest_choice_comes_first() -> None:
    with pytest.raises(ConfigError) as caught:
        solve_batch(512, 8, 24, None, 8)
    assert "are: 4 nodes, micro batch 8, accumulation 2; 2 nodes" in str(caught.value)


def test_no_number_of_nodes_fits() -> None:
    with pytest.raises(ConfigError, match="No number of nodes with 8 ranks each divides it"):
        solve_batch(20, 1, 16, None, 8)


def test_no_more_nodes_are_offered_than_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        solve_batch(512, 8, 24, None, 8, max_nodes=3)
    assert "are: 2 nodes" in str(caught.value)
    assert "4 nodes" not in str(caught.value)


def test_topology_counts() -> None:
    assert Topology(4, 8, 8).world_size == Topology(4, 8, 8).num_gpus == 32
    cpu = Topology(3, 2, 0)
    assert (cpu.world_size, cpu.num_gpus) == (6, 0)


@pytest.mark.parametrize("fields", [(0, 1, 0), (1, 0, 0), (1, 4, 8), (1, 1, -1)])
def test_topologies_that_cannot_be(fields: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        Topology(*fields)


def test_an_absurd_number_of_nodes_is_answered_at_once() -> None:
    with pytest.raises(ConfigError, match="24 nodes, micro batch 1"):
        solve_batch(24, 2, 10**15)


def rl_run(batch: int, micro: int, iterations: int = 1) -> list[str]:
    """A rollout of 32 prompts x 8 completions, trained on in steps of `batch`."""
    return [
        "stage=rl",
        "rollout.num_prompts=32",
        "rollout.num_generations=8",
        f"train.global_batch_size={batch}",
        f"train.micro_batch_size={micro}",
        f"rl.num_iterations={iterations}",
    ]


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "accumulation"),
    [(256, 8, 4, 8), (256, 8, 1, 32), (128, 16, 8, 1), (64, 16, 8, 1), (256, 10, 4, 7)],
)
def test_an_rl_step_accumulates_until_every_completion_had_its_turn(
    batch: int, micro: int, ranks: int, accumulation: int
) -> None:
    plan = batch_of(load(None, rl_run(batch, micro)), Topology(1, ranks, ranks))
    assert plan == BatchPlan(batch, micro, accumulation)
    assert (accumulation - 1) * ranks * micro < batch <= accumulation * ranks * micro


@pytest.mark.parametrize(
    ("batch", "iterations", "updates"), [(256, 1, 1), (64, 1, 4), (64, 3, 12), (128, 2, 4)]
)
def test_updates_of_a_rollout(batch: int, iterations: int, updates: int) -> None:
    assert updates_per_rollout(load(None, rl_run(batch, 8, iterations))) == updates


def test_a_step_that_splits_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="in whole groups; 256 makes one update a rollout"):
        batch_of(load(None, rl_run(36, 4)), Topology(1, 1, 1))
