"""The words of a sweep become points with lasting names."""

import time

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.sweeps.definition import points_of, read_words


def test_lists_and_ranges_vary_and_single_values_are_for_all() -> None:
    grid, fixed = read_words(
        ["train.lr=1e-4,3e-4", "train.seed=0..2", "train.num_steps=5", "data.traces=[a,b]"]
    )
    assert grid == {"train.lr": ["1e-4", "3e-4"], "train.seed": ["0", "1", "2"]}
    assert fixed == ["train.num_steps=5", "data.traces=[a,b]"]
    assert [point.name for point in points_of(grid)][:4] == [
        *("lr_1e-4-seed_0", "lr_1e-4-seed_1", "lr_1e-4-seed_2"),
        "lr_3e-4-seed_0",
    ]


def test_a_list_of_lists_a_quoted_text_and_a_placeholder() -> None:
    grid, fixed = read_words(["data.traces=[a,b],[c]", "x='p,q',r", "lr=1"])
    assert grid == {"data.traces": ["[a,b]", "[c]"], "x": ["'p,q'", "r"], "lr": ["1"]}
    assert fixed == []


@pytest.mark.parametrize("words", [["train.lr=1,,2"], ["x=1,2", "x=3"], ["x="], ["train.seed=5..2", "x=1"]])
def test_what_is_no_list_of_values_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        read_words(words)


def test_too_many_points_are_refused() -> None:
    with pytest.raises(UsageError, match="100,000 points"):
        read_words(["train.seed=0..999", "train.lr=0..999"])
    began = time.process_time()
    with pytest.raises(UsageError, match="100,000 points"):
        read_words(["train.seed=0..99999999"])
    assert time.process_time() - began < 30, "without making the points"


def test_a_value_that_is_no_folder_name_gets_a_lasting_one() -> None:
    a, b = points_of({"model.path": ["org/a", "org.a"]})
    assert a.name.startswith("path_org.a-")
    assert b.name == "path_org.a"
    assert points_of({"model.path": ["z", "org/a"]})[1].name == a.name
    assert [len(p.name) for p in points_of({"x": ["1" * 90]})] == [64]


def test_keys_with_the_same_last_part_keep_their_sections() -> None:
    assert points_of({"train.seed": ["1"], "data.seed": ["2"]})[0].name == "train.seed_1-data.seed_2"
