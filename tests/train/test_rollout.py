"""A rollout on disk: a checkpoint gives back what was put in, and a damaged batch is refused, not used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.base.errors import StateError
from r1hpc.train.rl.rollout import (
    Groups,
    Rollout,
    load_rollout,
    read_groups,
    save_rollout,
    varied,
    write_groups,
)


def groups(first_item: int, longest: int) -> Groups:
    """Two items with two completions each; those of the second are rewarded alike."""
    rng = np.random.default_rng(first_item)
    lengths = np.array([longest, 1, 2, longest], np.int32)
    inside = np.arange(longest)[None, :] < lengths[:, None]
    return Groups(
        items=np.array([first_item, first_item + 1]),
        tokens=np.where(inside, rng.integers(2, 9, (4, longest)), 0).astype(np.int32),
        logprobs=np.where(inside, rng.normal(-2, 1, (4, longest)), 0).astype(np.float32),
        lengths=lengths,
        ended=np.array([True, True, False, True]),
        rewards=np.array([0.0, 1.0, 0.5, 0.5]),
        correct=np.array([False, True, False, False]),
        failed=np.array([False, False, True, False]),
        terms={"accuracy": np.array([0.0, 1.0, 0.0, 0.0])},
    )


def assert_same(ours: Groups, theirs: Groups) -> None:
    for name, value in vars(theirs).items():
        if name == "terms":
            assert ours.terms.keys() == theirs.terms.keys()
            assert all((ours.terms[term] == value[term]).all() for term in value)
        else:
            np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)
            assert getattr(ours, name).dtype == value.dtype, name


NUMBERS = np.linspace(0, 1, 20).reshape(4, 5)


@pytest.mark.parametrize("kept", [{}, {"values": NUMBERS}, {"old_logprobs": -NUMBERS}], ids=str)
def test_a_checkpoint_gives_the_rollout_back(tmp_path: Path, kept: dict[str, Any]) -> None:
    rollout = Rollout(groups(3, 5), "policy", num_items=6, rollout_time_s=1.5, **kept)
    assert load_rollout(tmp_path, 6) is None
    save_rollout(tmp_path, rollout)
    back = load_rollout(tmp_path, 6)
    assert back is not None
    assert_same(back.groups, rollout.groups)
    assert (back.policy_id, back.num_items, back.rollout_time_s) == ("policy", 6, 0.0)
    assert back.checksum() == rollout.checksum()
    for name in ("values", "old_logprobs"):
        found = getattr(back, name)
        assert (found is None) == (name not in kept)
        assert name not in kept or (found == kept[name]).all()


def test_its_files_have_the_names_that_checkpoints_already_have(tmp_path: Path) -> None:
    save_rollout(tmp_path, Rollout(groups(0, 3), "policy", 2, values=np.zeros((4, 3))))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "stage_rank_0_values.npy",
        "stage_rank_0_window.npz",
    ]


def test_a_rollout_of_a_version_without_failures_is_read(tmp_path: Path) -> None:
    path, ours = tmp_path / "batch.npz", groups(0, 3)
    write_groups(path, ours, "policy")
    with np.load(path) as file:
        arrays = {name: value for name, value in file.items() if name != "failed"}
    np.savez(path, **arrays)
    _, back = read_groups(path)
    assert_same(back, replace(ours, failed=np.zeros(4, np.bool_)))
    assert Rollout(back, "policy", 2).facts()["scoring_failed_share"] == 0.0
    assert Rollout(ours, "policy", 2).facts()["scoring_failed_share"] == 0.25


def test_batches_of_different_widths_are_joined_and_taken_apart_again() -> None:
    narrow, wide = groups(0, 2), groups(2, 5)
    joined = Groups.joined([narrow, wide])
    assert joined.tokens.shape == (8, 5)
    assert joined.items.tolist() == [0, 1, 2, 3]
    assert_same(joined.select([2, 3]), wide)
    assert (joined.select([0, 1]).tokens[:, :2] == narrow.tokens).all()
    assert varied(joined).tolist() == [True, False, True, False]


def test_a_group_that_differs_by_too_great_lengths_alone_says_nothing_of_its_question() -> None:
    """DAPO samples on for it (arXiv 2503.14476, eq. 11)."""
    both = Groups.joined([groups(0, 3), groups(2, 3)])
    lengths = np.zeros(8)
    lengths[4] = -1.0
    told = replace(both, rewards=both.rewards + lengths, terms={**both.terms, "overlong": lengths})
    assert varied(both).tolist() == [True, False, True, False]
    assert varied(told).tolist() == [True, False, True, False]
    alike = replace(told, rewards=1.0 + lengths)
    assert varied(alike).tolist() == [False, False, True, False]
    assert varied(alike, overlong_weight=1.0).tolist() == [False] * 4


def test_the_checksum_sees_items_completions_and_rewards_and_no_padding() -> None:
    one = Rollout(groups(0, 3), "policy", 2)
    padded = Groups.joined([groups(0, 3), groups(2, 5)]).select([0, 1])
    assert Rollout(padded, "another", 2).checksum() == one.checksum()
    for name in ("items", "tokens", "rewards"):
        changed = {**vars(one.groups), name: getattr(one.groups, name) + 1}
        assert Rollout(Groups(**changed), "policy", 2).checksum() != one.checksum(), name


@pytest.mark.parametrize("size", [0, 40, 400])
def test_a_batch_that_was_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "batch.npz"
    write_groups(path, groups(0, 3), "policy")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StateError, match="holds no rollout"):
        read_groups(path)
