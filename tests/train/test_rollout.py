"""A rollout on disk: a checkpoint gives back what was put in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.train.rl.rollout import Rollout, load_rollout, save_rollout, varied
from r1hpc.train.rollout.groups import Groups
from tests.train.test_groups import assert_same, groups

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
