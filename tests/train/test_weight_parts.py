"""Weights cut into equal parts of all ranks are the same weights when they are joined."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.train.checkpoint.deepspeed_io import Weights, join_weights, part_name, pieces_of, take_weights
from r1hpc.train.parallel.errors import ResumeError

SHAPES = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9)), min_size=1, max_size=6)


def made(shapes: list[tuple[int, int]]) -> Weights:
    dtypes = (torch.bfloat16, torch.float32)
    return {f"w{i}": torch.randn(shape).to(dtypes[i % 2]) for i, shape in enumerate(shapes)}


@given(SHAPES, st.integers(1, 5))
@settings(max_examples=60)
def test_the_parts_of_all_ranks_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], world_size: int
) -> None:
    folder, weights = tmp_path_factory.mktemp("parts"), made(shapes)
    save(folder, weights, world_size)
    joined = join_weights({"module": {}}, folder)["module"]
    assert joined.keys() == weights.keys()
    for name, weight in weights.items():
        assert joined[name].dtype == weight.dtype
        assert torch.equal(joined[name], weight)


def test_each_rank_writes_its_share_also_of_one_large_weight() -> None:
    weights = {"embedding": torch.randn(1000, 8), "small": torch.randn(3)}
    sizes = [sum(piece[3].nbytes for piece in pieces_of(weights, rank, 4)) for rank in range(4)]
    assert sum(sizes) == sum(weight.nbytes for weight in weights.values())
    assert max(sizes) - min(sizes) <= 4


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    embedding = torch.randn(6, 4)
    weights = {"head": embedding.detach(), "embedding": embedding.detach()}
    save(tmp_path, weights, 2)
    assert sum(piece[3].numel() for rank in (0, 1) for piece in pieces_of(weights, rank, 2)) == 24
    joined = join_weights({"module": {}}, tmp_path)["module"]
    assert torch.equal(joined["head"], embedding)
    assert torch.equal(joined["embedding"], embedding)


def test_a_part_that_is_missing_is_no_zero(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.randn(8, 8)}, 2)
    (tmp_path / part_name(1)).unlink()
    with pytest.raises(ResumeError, match="32 of the 64 elements of w"):
        join_weights({"module": {}}, tmp_path)


def test_buffers_stay_in_deepspeeds_file() -> None:
    weight, buffer = torch.ones(2), torch.zeros(2)
    module = {"w": weight, "b": buffer, "extra": {"scale": 2}}
    rest, weights = take_weights({"module": module, "buffer_names": ["b"], "global_steps": 3})
    assert rest["module"].keys() == {"b", "extra"}
    assert rest["global_steps"] == 3
    assert weights == {"w": weight}


def save(folder: Path, weights: Weights, world_size: int) -> None:
    for rank in range(world_size):
        torch.save(pieces_of(weights, rank, world_size), folder / part_name(rank))
