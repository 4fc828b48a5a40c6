"""The words of a sweep become points with lasting names."""

import time

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.sweeps.definition import Definition, points_of, read_words, same_value


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


def definition(*calls: str) -> Definition:
    return Definition("job", [], [], None, [read_words(words.split())[0] for words in calls])


@pytest.mark.parametrize("words", ["train.lr=1e-4,0.0001,1e-04,100e-6", "lr=1e-4,0.0001,.0001"])
def test_spellings_of_a_number_are_one_point(words: str) -> None:
    (point,) = definition(words).points()
    assert point.name == "lr_1e-4"
    assert "are one value" in definition(words).spellings()[0]


def test_truth_has_one_spelling_in_a_setting_alone() -> None:
    assert len(definition("model.activation_checkpointing=true,True,yes,false").points()) == 2
    assert len(definition("flag=true,True").points()) == 2


@pytest.mark.parametrize(("key", "values"), [("x", "007,7"), ("model.path", "1,1.0"), ("x", "1e-4,1e-5")])
def test_other_values_stay_apart(key: str, values: str) -> None:
    assert len({same_value(key, text) for text in values.split(",")}) == 2


def test_points_of_another_spelling_are_found_again() -> None:
    found = definition("lr=1e-4 train.seed=0..1", "lr=0.0001 train.seed=1,2").points()
    assert [point.name for point in found] == ["lr_1e-4-seed_0", "lr_1e-4-seed_1", "lr_0.0001-seed_2"]
    assert {point.settings["lr"] for point in found} == {"1e-4"}, "one row of the table"
