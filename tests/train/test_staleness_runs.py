"""Rollouts sampled ahead, in whole runs: which version samples what; disturbed, it is the same run."""

from pathlib import Path

import numpy as np
import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.metrics import read_steps
from r1hpc.train.rollout.groups import read_groups
from tests.runs import at, submit, wait_over
from tests.train.test_rl_disturbed import assert_same_learning, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORDS = (
    *("rl.max_staleness=2", "train.num_steps=10", "checkpoint.save_every=4", "evaluate.every=0"),
    *("resources.ranks_per_node=1", "evaluate.num_items=2", "limits.max_crashes=9"),
)
"""Five rollouts of four batches, with two updates each."""
DISTURBANCES = (
    "rollout.batch:term:0:6:1",  # while rollout 1 is sampled ahead; rollout 0 is finished
    "update.begin:kill9:0:6:2",  # back to step 4, where rollouts 2 and 3 are in the checkpoint
    "update.begin:term:0:1:3",  # between the two updates of rollout 2
)


def follow(root: Path, name: str, *failpoints: str, more: tuple[str, ...] = ()) -> RunDir:
    run = submit(root, name, *WORDS, *more, job="jobs/rl_smoke.yaml", env=at(*failpoints)).run
    wait_over(run)
    return run


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return follow(tmp_path_factory.mktemp("runs"), "quiet")


def test_a_rollout_is_as_stale_as_it_may_be_and_no_more(quiet: RunDir) -> None:
    steps = [step for _, step in sorted(read_steps(quiet).effective.items())]
    first = [step.extra for step in steps if step.extra and step.extra["update"] == 0]
    assert [line["staleness_max"] for line in first] == [0, 1, 2, 2, 2]
    assert [line["staleness_mean"] for line in first] == [0, 1, 2, 2, 2]
    assert [line["logprob_difference"] is None for line in first] == [False, True, True, True, True]
    assert [line["drift"] is None for line in first] == [True, False, False, False, False]
    assert first[0]["logprob_difference"] < 1e-5 < min(line["drift"] for line in first[1:])
    assert all(0 < line["importance_effective_share"] < 1.001 for line in first)
    # Three are sampled before the first update, then one for each trained on, and none beyond the end.
    assert [line["rollout_time_s"] > 0 for line in first] == [True, True, True, False, False]


def test_files_of_groups_name_the_version_that_sampled_them(quiet: RunDir) -> None:
    (last,) = quiet.rollouts.glob("window-*")
    assert last.name == "window-00000004"
    for path in last.iterdir():
        _, groups = read_groups(path)
        inside = np.arange(groups.tokens.shape[1])[None, :] < groups.lengths[:, None]
        assert set(groups.versions[inside].tolist()) == {2}


def test_stopped_and_killed_it_is_the_same_run(quiet: RunDir, tmp_path: Path) -> None:
    run = follow(tmp_path, "disturbed", *DISTURBANCES)
    causes = [attempt.cause for attempt in read_history(run).attempts]
    assert causes == [Cause.preempted, Cause.crash, Cause.preempted, Cause.finished]
    assert_same_learning(run, quiet)
    records = [sorted(path.read_bytes() for path in one.trained.iterdir()) for one in (run, quiet)]
    assert records[0] == records[1]


def test_its_record_replays_to_the_same_weights_without_sampling(quiet: RunDir, tmp_path: Path) -> None:
    """The replay is killed once, too."""
    assert len(list(quiet.trained.glob("*.json"))) == len(list(quiet.trained.glob("*.npz"))) == 5
    kill = "update.begin:kill9:0:6:1"
    run = follow(tmp_path, "replay", kill, "rollout.batch:exit:*:1", more=(f"rl.replay={quiet.path}",))
    assert [attempt.cause for attempt in read_history(run).attempts] == [Cause.crash, Cause.finished]
    assert weights_of(run) == weights_of(quiet)
    losses = [[step.loss for step in read_steps(one).effective.values()] for one in (run, quiet)]
    assert losses[0] == losses[1]
    assert not list(run.rollouts.glob("window-*"))


def test_a_replay_that_comes_to_other_weights_ends_there(quiet: RunDir, tmp_path: Path) -> None:
    """On two ranks sums are rounded otherwise. It says so at the first rollout after the first update."""
    more = (f"rl.replay={quiet.path}", "resources.ranks_per_node=2", "train.num_steps=10")
    run = submit(tmp_path, "other", *WORDS, *more, job="jobs/rl_smoke.yaml").run
    wait_over(run)
    (attempt,) = read_history(run).attempts
    assert attempt.cause is not Cause.finished
    assert "before rollout 1 this run has other weights than" in attempt.detail
