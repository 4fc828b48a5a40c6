"""The size of a part is settled by the first submission, by its ranks, and stays that of the run."""

import json
from pathlib import Path

import pytest

from r1hpc.config import load
from r1hpc.submission import start_run
from r1hpc.submission.order import Order, Purpose
from r1hpc.submission.plan_run import PlannedRun, plan_new_run
from r1hpc.submission.resume import plan_resumed_run

_JOB = """
stage: evaluate
model:
  tokenizer: characters
  from_scratch: true
  config: {model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 2}
task: {name: file, options: {path: test.jsonl, template: "{question}"}}
evaluate: {path: test.jsonl, num_samples: 1}
rollout: {max_prompt_length: 8, max_completion_length: 8}
train: {precision: fp32}
resources: {nodes: 4, gpus_per_node: 8, time: "01:00:00"}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    Path("job.yaml").write_text(_JOB)
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(640)]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _order(*overrides: str, resume: bool = False) -> Order:
    return Order(
        Purpose.dry_run,
        "slurm",
        overrides=overrides,
        job=None if resume else "job.yaml",
        run_root=Path("runs").absolute(),
        run_name="a",
        resume=resume,
    )


def _begun(*overrides: str) -> PlannedRun:
    """A run whose folder is there."""
    planned = plan_new_run(_order(*overrides))
    start_run.create(planned.run)
    start_run.write(planned, _order(*overrides))
    return planned


def _notes(planned: PlannedRun) -> list[str]:
    return [note for note in planned.notes if "get nothing to do" in note]


def test_it_follows_the_ranks_and_is_frozen() -> None:
    begun = _begun()
    assert (begun.config.generate.items_per_part, begun.plan.num_steps) == (5, 128)
    assert load.read(begun.run.config).generate.items_per_part == 5
    assert _notes(begun) == []
    resumed = plan_resumed_run(_order("resources.nodes=1", resume=True))
    assert (resumed.config.generate.items_per_part, resumed.plan.num_steps) == (5, 128)


def test_a_run_of_before_goes_on_with_its_parts() -> None:
    begun = _begun("generate.items_per_part=256")  # as the default was, in every config.yaml
    assert begun.plan.num_steps == 3
    (said,) = _notes(begun)
    assert said.startswith("29 of 32 ranks get nothing to do: 640 items in parts of 256 make 3;")
    resumed = plan_resumed_run(_order("resources.nodes=8", resume=True))
    assert (resumed.config.generate.items_per_part, resumed.plan.num_steps) == (256, 3)
