"""Said at submission: questions that are asked again, and training files that an evaluation cannot search."""

import json
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.submission.order import Order, Purpose
from r1hpc.submission.plan_run import PlannedRun, plan_new_run
from r1hpc.submit import main as submit
from tests.submission.chains import write_chain
from tests.tasks.own_code import write

_OWN = """
    class Sums:
        judge = "exact"
        def __len__(self): return 60
        def question(self, index): return f"{index}+1=", str(index + 1)
"""
_CHAIN = """\
include: [deepspeed/zero1]
resources: {gpus_per_node: 0, ranks_per_node: 1, cpus_per_task: 1, time: "00:20:00"}
model: {tokenizer: characters}
rollout: {max_prompt_length: 8, max_completion_length: 8}
stages:
  - {name: traces, stage: traces, generate: {num_items: 4}}
  - name: tests
    needs: [traces]
    include: [model/tiny_gpt2]
    stage: evaluate
    model: {from_scratch: true}
    task: {name: file, options: {template: "{question}", judge: exact}}
"""


def _plan(*overrides: str) -> PlannedRun:
    return plan_new_run(
        Order(Purpose.dry_run, "local", overrides=overrides, job="jobs/rl_smoke.yaml", run_root=Path("runs"))
    )


def _rows(path: Path) -> Path:
    path.write_text("".join(json.dumps({"question": f"{n}=", "answer": str(n)}) + "\n" for n in range(9)))
    return path


def test_a_run_that_asks_its_list_again_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "sums.py", _OWN)
    own = (f"task.name={path}:Sums", "task.options={}", "evaluate.num_items=2", "rollout.max_prompt_length=8")
    (said,) = [note for note in _plan(*own, "train.num_steps=24").notes if "come again" in note]
    assert said.startswith("task Sums is asked items 0 to 95, and has 5")
    assert not [note for note in _plan(*own).notes if "come again" in note], "48 of some 54"


def test_training_files_are_looked_for_before_the_queue(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "rows.jsonl")
    asking = (
        "stage=evaluate",
        "evaluate.num_items=null",
        "task.options={template: '{question}', judge: exact}",
    )
    where = (*asking, "task.name=file", f"evaluate.path={rows}")
    assert _plan(*where, f"evaluate.trained_on=[{rows}]").config.evaluate.trained_on == [str(rows)]
    with pytest.raises(UsageError, match=r"evaluate.trained_on: .*/no.jsonl is not there"):
        _plan(*where, f"evaluate.trained_on=[{tmp_path}/no.jsonl]")
    with pytest.raises(UsageError, match=r"and stage rl reports nothing of it: take it out"):
        _plan(f"evaluate.trained_on=[{rows}]")


def test_what_another_stage_will_write_is_not_looked_for(tmp_path: Path) -> None:
    words = [str(write_chain(tmp_path, _CHAIN, "")), "--executor", "local", "--dry-run"]
    words += ["--run-root", str(tmp_path / "runs"), f"tests:evaluate.path={_rows(tmp_path / 'rows.jsonl')}"]
    assert submit([*words, "tests:evaluate.trained_on=[${stage:traces}/traces.jsonl]"]) == 0
    with pytest.raises(UsageError, match=r"stage tests: evaluate.trained_on: .*nothing.jsonl is not there"):
        submit([*words, f"tests:evaluate.trained_on=[{tmp_path}/nothing.jsonl]"])
