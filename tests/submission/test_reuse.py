"""A new chain that begins with finished stages of an earlier one."""

import shutil
from pathlib import Path

import pytest

from r1hpc.base.choose_run import all_runs
from r1hpc.submission.chain.folder import ChainDir
from tests.submission.chains import actions_of, jobs_of, submit, write_attempt, write_chain
from tests.submission.test_submission import Place

_STAGES = """\
  - name: a
  - name: b
    model: {{path: "${{stage:a}}/model"}}
    reward: {{terms: {{"{folder}/rewards.py:brevity": 1.0}}}}
  - name: c
"""
_REWARD = "def brevity(prompt, completion, answer, metadata):\n    return 0.0\n"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A chain whose first two stages are finished; the second one has a reward of its own."""
    made = Place(tmp_path)
    (tmp_path / "rewards.py").write_text(_REWARD)
    write_chain(tmp_path, _STAGES.format(folder=tmp_path))
    made.submit()
    for job, name in (("1", "a"), ("2", "b")):
        write_attempt(made.chain, name, job, "finished")
        made.slurm.set_state(job, "COMPLETED")
    return made


def test_from_a_stage_on_everything_is_done_again(place: Place) -> None:
    answer = place.submit("--run-name", "again", "--from", "b", "b:train.lr=1e-3")
    assert actions_of(answer) == ["finished", "submitted", "submitted"]
    assert jobs_of(answer) == [None, "4", "5"]
    assert place.slurm.jobs()[3].dependency == ""
    again = ChainDir(place.root / "runs" / "again")
    assert again.stage("a").path.readlink() == place.chain.stage("a").path.resolve()
    assert "stage a is that of small" in str(answer["notes"])
    assert actions_of(place.submit("--run-name", "again")) == ["finished", "at work", "at work"]
    assert "finished" in place.command("status", "again", on_chain=False)
    runs = [run.path for run in all_runs(place.root / "runs")]
    assert again.stage("a").path not in runs, "its hours count once"
    assert len(runs) == 5


def test_a_reward_that_changed_since_its_stage_finished_is_named(place: Place) -> None:
    assert "rewards.py" not in str(place.submit("--dry-run")["notes"])
    (place.root / "rewards.py").write_text(_REWARD.replace("0.0", "1.0"))
    (note,) = (each for each in place.submit("--dry-run")["notes"] if "rewards.py" in each)
    assert note.startswith("stage b is finished: ")
    assert "has changed since" in note
    assert note.endswith("--run-name NAME --from small:b runs it again with them")


def test_a_stage_of_another_chain_is_reused_although_the_file_has_other_settings(place: Place) -> None:
    assert "attempt 1" in place.command("diagnose"), "a chain stands for its newest stage"
    words = ["--run-name", "other", "--reuse", "small:a", "train.lr=1e-3"]
    dry = place.submit(*words, "--dry-run")
    assert actions_of(dry) == ["finished", "submitted", "submitted"]
    assert not (place.root / "runs" / "other").exists()
    answer = place.submit(*words)
    assert "stage a is that of small, which ran with another train.lr" in str(answer["notes"])


def test_a_name_is_free_after_a_kill_between_the_links_and_the_definition(place: Place) -> None:
    words = (str(place.file), "--run-name", "again")
    environment = place.environment(R1HPC_FAILPOINT="chain.linked:kill9")
    assert submit(place.root, *words, "--from", "b", env=environment).returncode == -9
    assert (place.root / "runs" / "again" / "a").is_symlink()
    assert actions_of(place.submit(*words[1:], "--dry-run")) == ["submitted"] * 3, "a link alone is no stage"
    assert submit(place.root, *words, "--from", "b", env=environment).returncode == -9
    assert actions_of(place.submit(*words[1:], "--from", "b")) == ["finished", "submitted", "submitted"]


def test_a_reused_stage_that_is_gone_is_named(place: Place) -> None:
    place.submit("--run-name", "again", "--from", "b")
    stage = place.chain.stage("a").path
    shutil.rmtree(stage)
    said = place.refused(str(place.file), "--run-name", "again")
    assert f"stage a: its reused stage is gone: {stage}" in said


def test_what_cannot_be_reused_is_refused(place: Place) -> None:
    for words, said in (
        (["--from", "c", "--run-name", "small"], "small exists: give the new chain another name"),
        (["--from", "d", "--run-name", "n"], "there is no stage 'd'"),
        (["--reuse", "none:a", "--run-name", "n"], "there is no chain none under"),
        (["--reuse", "a", "--run-name", "n"], "write CHAIN:STAGE"),
        (["--reuse", "small:c", "--run-name", "n"], "it has not finished"),
    ):
        assert said in place.refused(str(place.file), *words)
    assert not (place.root / "runs" / "n").exists()
    assert "take the file of a chain" in place.refused("jobs/smoke.yaml", "--from", "sft")
