"""What a run asks stays the same over its attempts: answers that are kept are to the same questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config import plugins
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.evaluations import read_evaluations
from r1hpc.train.generate.evaluate import Asking, refuse_other_asking
from r1hpc.train.loop.session import Job
from r1hpc.train.rl.rl import has_kept
from tests.runs import at, submit, wait_over, wait_until
from tests.teachers import write_teacher
from tests.train.test_generate import _Rank, job_of

_EVALUATION = """
stage: evaluate
task: {name: chain_sum, options: {num_terms: 3}}
rollout: {max_prompt_length: 8, max_completion_length: 8}
generate: {items_per_part: 4}
evaluate: {num_items: 8, num_samples: 2}
train: {precision: fp32}
resources: {nodes: 1, gpus_per_node: 0, ranks_per_node: 1, cpus_per_task: 1, time: "00:30:00"}
"""


_SINCE = "the first part was made"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run = RunDir(tmp_path / "run")
    return job_of(_Rank(run, 0), run)


def _asks(job: Job, asking: Asking, has_kept: bool = True) -> None:
    refuse_other_asking(job, job.run.parts / "questions.json", asking, _SINCE, lambda: has_kept)


def test_the_first_attempt_says_what_is_asked_and_no_other_asks_anything_else(job: Job) -> None:
    for _ in range(2):
        _asks(job, Asking("task 1"))
    with pytest.raises(UsageError, match="changed since the first part was made, from task 1 to task 2: put"):
        _asks(job, Asking("task 2"))


@pytest.mark.parametrize(
    ("asking", "said"),
    [
        (Asking("task", "form 2", "weights"), r"the prompts for None have changed .*put the files"),
        (Asking("task", "form", "weights 2"), "the weights in None have changed since the first part was"),
    ],
)
def test_nor_puts_it_otherwise_or_to_other_weights(job: Job, asking: Asking, said: str) -> None:
    _asks(job, Asking("task"))  # as an older version noted it
    for _ in range(2):
        _asks(job, Asking("task", "form", "weights"))
    _asks(job, Asking("task", "form"))  # all parts are made: no model is loaded
    with pytest.raises(UsageError, match=said):
        _asks(job, asking)


def test_until_anything_is_kept_it_may_be_mended(job: Job) -> None:
    """A first attempt that died of memory leaves no answers, and its model may be exported anew."""
    _asks(job, Asking("task", "form", "weights"), has_kept=False)
    _asks(job, Asking("task 2", "form 2", "weights 2"), has_kept=False)
    _asks(job, Asking("task 2", "form 2", "weights 2"))
    with pytest.raises(UsageError, match="the weights in None have changed"):
        _asks(job, Asking("task 2", "form 2", "weights"))


@pytest.mark.timeout(300)
def test_the_parts_of_an_evaluation_are_of_one_model(tmp_path: Path) -> None:
    """The folder is exported to again while an evaluation of it waits for its next slice of time."""
    model = write_teacher(tmp_path / "model")
    (tmp_path / "job.yaml").write_text(_EVALUATION)
    run = RunDir(tmp_path / "run")
    first, second = run.parts / "part-000000.jsonl", "evaluate.batch:{}::2:1"
    stopped = at(second.format(f"until={run.stop}"), second.format("sleep=1.1"))  # it looks once a second
    submit(tmp_path, "run", f"model.path={model}", job=str(tmp_path / "job.yaml"), env=stopped)
    wait_until("first part", first.exists, 120, run)
    run.stop.touch()
    assert [attempt.cause for attempt in wait_over(run)] == [Cause.stopped]
    kept = first.read_bytes()

    write_teacher(model, seed=8)
    submit(tmp_path, "run", "--resume")
    last = wait_over(run)[-1]
    assert (last.cause, "the weights in" in last.detail) == (Cause.refused, True)

    write_teacher(model)
    submit(tmp_path, "run", "--resume")
    assert wait_over(run)[-1].cause is Cause.finished
    assert first.read_bytes() == kept


def _write(path: Path, first: int) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"{n}=", "answer": str(n % 10)} for n in range(first, first + 8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.timeout(300)
def test_rl_does_not_evaluate_on_another_test_file_after_a_resume(tmp_path: Path) -> None:
    """The submission says so, and for a run whose files were not noted the ranks do."""
    folder = tmp_path / "tests"
    folder.mkdir()
    _write(folder / "test.jsonl", 100)
    sets = (
        f"evaluate.sets={{own: {{path: {folder}, template: '{{question}}', judge: exact, num_items: null}}}}"
    )
    words = ("resources.ranks_per_node=1", "evaluate.num_items=null", "evaluate.every=0", "train.num_steps=2")
    run = submit(tmp_path, "run", sets, *words, "checkpoint.save_every=2", job="jobs/rl_smoke.yaml").run
    assert [attempt.cause for attempt in wait_over(run)] == [Cause.finished]
    assert set(read_evaluations(run)) == {0, 2}
    record = run.metrics / "evaluated.json"
    assert read_json(record)["task"].startswith("benchmarks")
    _write(folder / "test.jsonl", 200)
    with pytest.raises(AssertionError, match=r"tests \(test\.jsonl\) has changed since this run began"):
        submit(tmp_path, "run", "--resume", "train.num_steps=4")
    (run.code / plugins.FOLDER / "files.json").unlink()
    submit(tmp_path, "run", "--resume", "train.num_steps=4")
    last = wait_over(run)[-1]
    assert last.cause is Cause.refused
    assert "the questions have changed since the run began" in last.detail
    record.unlink()  # as a run of before
    submit(tmp_path, "run", "--resume", "train.num_steps=4")
    assert wait_over(run)[-1].cause is Cause.finished
    assert set(read_evaluations(run)) == {0, 2, 4}


@pytest.mark.parametrize(
    ("path", "is_kept"),
    [
        ("checkpoints/.incarnation-1-t/begun", False),
        ("checkpoints/step-00000010/manifest.json", True),
        ("rollouts/window-00000000/batch-000000000000-4.npz", True),
        ("rollouts/evaluation-00000000/part-00000000-4.json", True),
        ("rollouts/window-00000000/.batch.tmp", False),
        ("metrics/evaluation.jsonl", True),
    ],
)
def test_what_an_attempt_of_rl_has_kept(tmp_path: Path, path: str, is_kept: bool) -> None:
    """Until then a question, a file or a template may be mended."""
    run = RunDir(tmp_path / "run")
    assert not has_kept(run)
    (run.path / path).parent.mkdir(parents=True)
    (run.path / path).touch()
    assert has_kept(run) is is_kept
