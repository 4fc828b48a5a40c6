"""Prompts are checked at submission: of a stage whose model an earlier stage will leave, by the tokenizer of
the folder that the chain begins with."""

import json
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.submit import main as submit
from tests.submission.chains import write_chain
from tests.teachers import write_teacher

_STAGES = """\
  - {name: sft, stage: sft, data: {traces: [SAID]}, train: {micro_batch_size: 2}}
  - {name: grpo, include: [rl/r1], stage: rl, model: {path: "${stage:sft}/model"}}
  - {name: after, stage: evaluate, model: {path: "${stage:grpo}/model"}}
"""
_COMMON = """\
include: [deepspeed/zero1]
task: {name: chain_sum, options: {num_terms: 3}}
resources: {gpus_per_node: 0, ranks_per_node: 1, cpus_per_task: 1, time: "00:20:00"}
train: {num_steps: 4, global_batch_size: 16, micro_batch_size: 16}
data: {seq_len: 32}
evaluate: {num_items: 16, num_samples: 1}
rollout: {num_prompts: 4, num_generations: 4, max_prompt_length: 8, max_completion_length: 8}
"""


def _words(root: Path, model: str) -> list[str]:
    said = root / "said.jsonl"
    said.write_text(json.dumps({"prompt": "1+1=", "completion": "<answer>2</answer>"}) + "\n")
    common = f"{_COMMON}model: {{path: {model}}}\n" + "stages:\n"
    job = write_chain(root, _STAGES.replace("SAID", str(said)), common)
    return [str(job), "--executor", "local", "--dry-run", "--run-root", str(root / "runs")]


def test_one_that_is_too_long_does_not_wait_for_the_cold_start(tmp_path: Path) -> None:
    words = _words(tmp_path, str(write_teacher(tmp_path / "model")))
    assert submit(words) == 0
    for stage in ("grpo", "after"):
        with pytest.raises(
            UsageError, match=rf"stage {stage}: a prompt has \d tokens: raise rollout.max_prompt"
        ):
            submit([*words, f"{stage}:rollout.max_prompt_length=2"])


def test_a_stage_in_another_form_than_the_one_that_trains_its_model_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = _words(tmp_path, str(write_teacher(tmp_path / "model")))
    assert submit([*words[:-1], "runs"]) == 0
    assert "which trained this model" not in capsys.readouterr().out
    assert submit([*words[:-1], "runs", "after:rollout.max_completion_length=4"]) == 0
    said = "rollout.max_completion_length is 4 here, and was 8 in grpo, which trained this model"
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_long_one_among_drawn_ones_is_found(tmp_path: Path) -> None:
    """Of nine characters is the 48th, the first with more than eight."""
    words = ["jobs/rl_smoke.yaml", "--executor", "local", "--dry-run", "--run-root", str(tmp_path)]
    words += ["task={name: countdown, options: !replace {num_numbers: 2, max_number: 10, max_target: 99}}"]
    assert submit([*words, "rollout.max_prompt_length=9"]) == 0
    with pytest.raises(UsageError, match=r"a prompt has 9 tokens: raise rollout\.max_prompt_length"):
        submit([*words, "rollout.max_prompt_length=8"])


def test_a_name_on_the_hub_is_its_folder_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--own--tiny" / "snapshots" / "0a"
    write_teacher(snapshot)
    (tmp_path / "hub" / "models--own--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--own--tiny" / "refs" / "main").write_text("0a")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    words = _words(tmp_path, "own/tiny")
    assert submit(words) == 0
    with pytest.raises(UsageError, match="stage grpo: a prompt has"):
        submit([*words, "grpo:rollout.max_prompt_length=2"])
