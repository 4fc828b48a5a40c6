"""A stage dealt to several jobs: each makes its own units; the dataset is the one that one process makes."""

import signal
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset, build_share, find_dataset
from r1hpc.corpus.build.stages import Share
from r1hpc.corpus.engine.work_dir import read_progress
from r1hpc.data.format.errors import DataError
from tests.corpus.builds import BPE, done_units, names, start_build
from tests.corpus.corpus import write_recipe, write_texts


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of a dozen parts."""
    write_texts(tmp_path)
    return write_recipe(tmp_path, tokenizer=BPE, part_bytes=300)


def test_shares_side_by_side_make_the_same_dataset(recipe: Path, tmp_path: Path) -> None:
    alone = build_dataset(recipe, tmp_path / "alone")
    out = tmp_path / "data" / "out"
    jobs = [start_build(recipe, out, "--stage", "tokens", "--share", f"{n}/3") for n in range(3)]
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    assert find_dataset(recipe, out) is None  # nobody publishes but the build that gathers them
    made = done_units(out.parent)
    together = build_dataset(recipe, out)
    assert (together.built, together.id) == (True, alone.id)
    assert names(out.parent) == {"out"}
    assert len(made) > 10


def test_a_share_makes_its_own_units_and_goes_on_after_a_kill(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "out"
    share = ("--stage", "tokens", "--share", "1/3")
    killed = start_build(recipe, out, *share, failpoint="data.unit.publish:kill9::3")
    assert killed.wait(60) == -signal.SIGKILL
    before = done_units(out.parent)
    other = start_build(recipe, out, "--stage", "tokenizer", "--share", "0/1")
    assert other.wait(60) == 0
    assert any(
        (out.parent / ".staging-out" / "tmp").iterdir()
    )  # what another job may be writing is left alone
    build_share(recipe, out, Share("tokens", 1, 3))
    (stage,) = [stage for stage in read_progress(out)["stages"] if stage["stage"] == "tokens"]
    assert stage["done"] == len(range(1, stage["units"], 3))
    assert before.items() <= done_units(out.parent).items()
    assert stage["cpu_s"] > 0
    assert 2**24 < stage["peak_memory_bytes"] < 2**33


def test_a_job_after_others_does_not_make_their_stages_anew(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code changes while the jobs of a build wait."""
    write_recipe(tmp_path, tokenizer=BPE, part_bytes=300, dedup={"exact": True})
    out = tmp_path / "data" / "out"
    for number in range(2):
        build_share(recipe, out, Share("clean", number, 2), after_others=True)
    build_share(recipe, out, Share("tokenizer", 0, 1), after_others=True)  # and dedup, on the way
    build_share(recipe, out, Share("tokens", 0, 2), after_others=True)
    before = done_units(out.parent)
    with pytest.raises(DataError, match=r"\d+ of \d+ units of stage tokens, which jobs before this one made"):
        build_dataset(recipe, out, after_others=True)
    with monkeypatch.context() as changed:
        changed.setattr("r1hpc.corpus.engine.units.code_hash", lambda: "of other code")
        with pytest.raises(DataError, match=r"units of stage clean.* the code or a library has changed"):
            build_share(recipe, out, Share("tokens", 1, 2), after_others=True)
    assert done_units(out.parent) == before
    build_share(recipe, out, Share("tokens", 1, 2), after_others=True)
    assert build_dataset(recipe, out, after_others=True).built


def test_a_share_that_cannot_be_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="share 3/3: the number lies from 0 to 2"):
        Share("tokens", 3, 3)
    with pytest.raises(UsageError, match="has no stage clean; it has tokenizer, tokens"):
        build_share(recipe, tmp_path / "out", Share("clean", 0, 1))
