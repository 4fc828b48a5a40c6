"""Groups in files: what was written is read, of every format, and a damaged file is refused, not used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.base.errors import StateError
from r1hpc.train.rollout.groups import OF_ITS_ROLLOUT, Groups, read_groups, write_groups

OF_FORMAT_1 = Path(__file__).resolve().parent.parent / "old_data/groups/format-1.npz"
"""A batch of jobs/rl_smoke.yaml, written before format 2."""


def groups(first_item: int, longest: int) -> Groups:
    """Two items with two completions each; those of the second are rewarded alike."""
    rng = np.random.default_rng(first_item)
    lengths = np.array([longest, 1, 2, longest], np.int32)
    inside = np.arange(longest)[None, :] < lengths[:, None]
    return Groups(
        items=np.array([first_item, first_item + 1]),
        tokens=np.where(inside, rng.integers(2, 9, (4, longest)), 0).astype(np.int32),
        logprobs=np.where(inside, rng.normal(-2, 1, (4, longest)), 0).astype(np.float32),
        versions=np.where(inside, np.arange(longest) // 2 + 3, 0).astype(np.int32),
        lengths=lengths,
        ended=np.array([True, True, False, True]),
        rewards=np.array([0.0, 1.0, 0.5, 0.5]),
        correct=np.array([False, True, False, False]),
        failed=np.array([False, False, True, False]),
        terms={"accuracy": np.array([0.0, 1.0, 0.0, 0.0])},
        prompts=((first_item, 7), (first_item + 1, 8, 9)),
    )


def assert_same(ours: Groups, theirs: Groups) -> None:
    for name, value in vars(theirs).items():
        if name == "terms":
            assert ours.terms.keys() == theirs.terms.keys()
            assert all((ours.terms[term] == value[term]).all() for term in value)
        elif name == "prompts":
            assert ours.prompts == value
        else:
            np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)
            assert getattr(ours, name).dtype == value.dtype, name


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def test_a_file_gives_groups_prompts_and_versions_back(tmp_path: Path) -> None:
    path, ours = tmp_path / "batch.npz", groups(4, 5)
    digest = write_groups(path, ours, "policy", {"engine": "sampler"})
    policy_id, back = read_groups(path, digest)
    assert policy_id == "policy"
    assert_same(back, ours)


def test_a_file_is_laid_out_as_the_module_says(tmp_path: Path) -> None:
    path, ours = tmp_path / "batch.npz", groups(4, 3)
    write_groups(path, ours, "policy")
    found = arrays_of(path)
    assert int(found["format"]) == 2
    assert found["offsets"].tolist() == [0, 5, 8, 13, 19]
    assert found["tokens"][8:13].tolist() == [5, 8, 9, *ours.tokens[2, :2].tolist()]
    assert found["sampled"][8:13].tolist() == [False, False, False, True, True]
    assert found["logprobs"][8:11].tolist() == [0, 0, 0]
    assert found["spans"].tolist()[4:6] == [[2, 0, 3, 0, 0], [2, 3, 5, 0, 1]]
    assert found["versions"].tolist()[:2] == [[0, 2, 4, 3], [0, 4, 5, 4]]
    assert found["finish"].tolist() == [0, 0, 1, 0]


def test_a_file_of_format_1_is_read() -> None:
    policy_id, found = read_groups(OF_FORMAT_1)
    assert policy_id == "6aeed9571a7848e1"
    assert found.items.tolist() == [24, 25]
    assert found.lengths.tolist() == [12, 8, 12, 12, 12, 2, 12, 12]
    assert found.ended.tolist() == [False, True, False, True, False, True, False, False]
    assert found.tokens[5, :2].tolist() == [20, 1]
    assert (found.versions == OF_ITS_ROLLOUT).all()
    assert found.prompts == ()
    # Beside groups that have their prompts, nobody knows all of them.
    assert Groups.joined([found, replace(found, prompts=((1,), (2,)))]).prompts == ()


def test_a_file_of_a_version_without_failures_is_read(tmp_path: Path) -> None:
    arrays = arrays_of(OF_FORMAT_1)
    del arrays["failed"]
    np.savez(tmp_path / "batch.npz", **arrays)
    _, back = read_groups(tmp_path / "batch.npz")
    assert back.failed.tolist() == [False] * 8


def test_batches_of_different_widths_are_joined_and_taken_apart_again() -> None:
    narrow, wide = groups(0, 2), groups(2, 5)
    joined = Groups.joined([narrow, wide])
    assert joined.tokens.shape == (8, 5)
    assert joined.items.tolist() == [0, 1, 2, 3]
    assert_same(joined.select([2, 3]), wide)
    assert (joined.select([0, 1]).tokens[:, :2] == narrow.tokens).all()


@pytest.mark.parametrize("size", [0, 40, 400, 2000])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "batch.npz"
    write_groups(path, groups(0, 3), "policy")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StateError, match="holds no rollout"):
        read_groups(path)


def test_other_bytes_than_announced_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    digest = write_groups(path, groups(0, 3), "policy")
    write_groups(path, groups(2, 3), "policy")
    with pytest.raises(StateError, match=f"its sha256 is not {digest}"):
        read_groups(path, digest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": np.array(3)}, "it has format 3, and this version of r1hpc reads up to 2"),
        ({"sampled": np.array([*[False, False, True, False, True], *[False] * 14])}, "several turns"),
        ({"rewards": np.zeros(3)}, "do not belong together"),
        ({"tokens": np.zeros(7, np.int32)}, "holds no rollout"),
        ({"tokens": np.array([{}] * 19, object)}, "holds no rollout"),
    ],
    ids=["newer format", "several turns", "one row less", "fewer tokens", "pickled"],
)
def test_what_this_version_cannot_train_on_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "batch.npz"
    write_groups(path, groups(4, 3), "policy")
    np.savez(path, **{**arrays_of(path), **change})
    with pytest.raises(StateError, match=words):
        read_groups(path)
