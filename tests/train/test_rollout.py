"""A rollout on disk: a checkpoint gives back what was put in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.train.rl.rollout import Rollout, load_rollouts, save_rollout, varied
from r1hpc.train.rollout.groups import OF_ITS_ROLLOUT, Groups
from tests.train.test_groups import assert_same, groups

NUMBERS = np.linspace(0, 1, 20).reshape(4, 5)


@pytest.mark.parametrize("kept", [{}, {"values": NUMBERS}, {"old_logprobs": -NUMBERS}], ids=str)
def test_a_checkpoint_gives_the_rollout_back(tmp_path: Path, kept: dict[str, Any]) -> None:
    rollout = Rollout(groups(3, 5), "policy", num_items=6, rollout_time_s=1.5, **kept)
    assert load_rollouts(tmp_path, [6]) == []
    save_rollout(tmp_path, rollout)
    [back] = load_rollouts(tmp_path, [6])
    assert_same(back.groups, rollout.groups)
    assert (back.policy_id, back.num_items, back.rollout_time_s) == ("policy", 6, 0.0)
    assert back.checksum() == rollout.checksum()
    for name in ("values", "old_logprobs"):
        found = getattr(back, name)
        assert (found is None) == (name not in kept)
        assert name not in kept or (found == kept[name]).all()


def test_a_checkpoint_gives_back_the_rollouts_sampled_ahead(tmp_path: Path) -> None:
    ahead = [Rollout(groups(4, 5), "policy", 2, index=8), Rollout(groups(6, 3), "newer", 4, index=9)]
    save_rollout(tmp_path, Rollout(groups(2, 5), "policy", 2, index=7), ahead)
    now, *back = load_rollouts(tmp_path, [2, 2, 4], 7)
    for ours, theirs in zip(back, ahead, strict=True):
        assert_same(ours.groups, theirs.groups)
        assert (ours.policy_id, ours.num_items, ours.index) == (
            theirs.policy_id,
            theirs.num_items,
            theirs.index,
        )
    assert now.index == 7


def test_a_group_is_as_stale_as_its_oldest_token() -> None:
    """The versions of these groups are 3, 3, 4, 4, 5 along a completion, of lengths 5, 1, 2, 5."""
    rollout = Rollout(groups(0, 5), "policy", 2, index=6)
    assert rollout.staleness().tolist()[1:] == [[3, 0, 0, 0, 0], [3, 3, 0, 0, 0], [3, 3, 2, 2, 1]]
    assert rollout.staleness_facts() == {"staleness_mean": 3.0, "staleness_max": 3}
    versions = np.where(np.arange(4)[:, None] < 2, 6, rollout.groups.versions)
    mixed = replace(rollout, groups=replace(rollout.groups, versions=versions))
    assert mixed.staleness_facts() == {"staleness_mean": 1.5, "staleness_max": 3}


def test_tokens_of_a_file_of_format_1_are_of_their_rollout() -> None:
    older = replace(groups(0, 5), versions=np.full((4, 5), OF_ITS_ROLLOUT, np.int32))
    assert not Rollout(older, "policy", 2, index=6).staleness().any()


def test_its_files_have_the_names_that_checkpoints_already_have(tmp_path: Path) -> None:
    save_rollout(tmp_path, Rollout(groups(0, 3), "policy", 2, values=np.zeros((4, 3))))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "stage_rank_0_values.npy",
        "stage_rank_0_window.npz",
    ]


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
    assert Rollout(groups(0, 3), "policy", 2).facts()["scoring_failed_share"] == 0.25
    for name in ("items", "tokens", "rewards"):
        changed = {**vars(one.groups), name: getattr(one.groups, name) + 1}
        assert Rollout(Groups(**changed), "policy", 2).checksum() != one.checksum(), name
