"""What a submission says of settings that are allowed and seldom meant."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import save
from r1hpc.config.schema.rl import EvaluateConfig, RewardConfig, RolloutConfig, TaskConfig
from r1hpc.config.schema.run import (
    CheckpointConfig,
    ModelConfig,
    MonitorConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from r1hpc.submission.plan_run import little_room
from r1hpc.train.checks.model import seldom_meant


def _config(model: ModelConfig, stage: str = "rl", **sections: Any) -> RunConfig:
    return RunConfig(stage=stage, model=model, **{"checkpoint": CheckpointConfig(save_every=1), **sections})


@pytest.mark.parametrize(
    ("stage", "model", "lr", "said"),
    [
        ("rl", ModelConfig(path="x"), 3e-4, "train.lr is 0.0003, the default, for pretraining"),
        ("sft", ModelConfig(path="x"), 3e-4, "1e-5 to 5e-5 in fine-tuning"),
        ("rl", ModelConfig(path="x", lora_rank=8), 1e-6, "adapters .* want some ten times the rate"),
        ("sft", ModelConfig(path="x", lora_rank=8), 2e-5, "adapters .* want some ten times the rate"),
        ("rl", ModelConfig(path="x"), 1e-6, None),
        ("rl", ModelConfig(path="x", lora_rank=8), 1e-5, None),
        ("rl", ModelConfig(path="x", from_scratch=True), 3e-4, None),
        ("pretrain", ModelConfig(path="x"), 3e-4, None),
    ],
)
def test_rates(stage: str, model: ModelConfig, lr: float, said: str | None) -> None:
    notes = seldom_meant(_config(model, stage, train=TrainConfig(lr=lr)))
    assert len(notes) == (said is not None)
    if said:
        assert re.search(said, notes[0])


def test_what_does_nothing_without_another_setting() -> None:
    notes = seldom_meant(_config(ModelConfig(lora_alpha=32.0, lora_targets=["q_proj"]), "pretrain"))
    assert notes == [
        "model.lora_alpha and model.lora_targets without model.lora_rank: no adapters, and all weights are "
        "trained"
    ]
    wandb = WandbConfig(mode="online")
    notes = seldom_meant(_config(ModelConfig(), "pretrain", monitor=MonitorConfig(wandb=wandb)))
    assert ["does not name wandb" in note for note in notes] == [True]
    named = MonitorConfig(wandb=wandb, trackers=["wandb"])
    assert not seldom_meant(_config(ModelConfig(lora_rank=8, lora_alpha=32.0), "evaluate", monitor=named))


def test_a_model_that_is_asked_otherwise_than_it_was_trained(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "grpo")
    run.create()
    trained = _config(
        ModelConfig(path="base", system_prompt="Think.", open_thinking=True),
        rollout=RolloutConfig(max_completion_length=1024),
        reward=RewardConfig(answer_in="boxed"),
        task=TaskConfig(name="file", options={"path": "a", "template": "{question}"}),
        train=TrainConfig(lr=1e-6),
    )
    save(trained, run.config)
    again = replace(trained, stage="evaluate", model=replace(trained.model, path=str(run.model)))
    assert seldom_meant(again) == []
    otherwise = _config(
        ModelConfig(path=str(run.model)), "evaluate", task=TaskConfig(name="file", options={"path": "b"})
    )
    notes = seldom_meant(otherwise)
    assert notes == [
        "model.system_prompt is None here, and was 'Think.' in grpo, which trained this model",
        "model.open_thinking is False here, and was True in grpo, which trained this model",
        "reward.answer_in is 'tags' here, and was 'boxed' in grpo, which trained this model",
        "task.options.template is None here, and was '{question}' in grpo, which trained this model",
        "rollout.max_completion_length is 64 here, and was 1024 in grpo, which trained this model",
        "answers are cut off at rollout.max_completion_length=64 tokens, the default",
    ]
    # A folder that is not a run's, and a run that cannot be read, say nothing.
    run.config.write_text("stage: [")
    assert len(seldom_meant(otherwise)) == 1


def test_test_files_are_answered_at_length() -> None:
    sets = EvaluateConfig(sets={"a": {"path": "x"}})
    (note,) = seldom_meant(_config(ModelConfig(path="x"), "evaluate", evaluate=sets))
    assert "cut off at rollout.max_completion_length=64" in note
    longer = RolloutConfig(max_completion_length=65)
    assert seldom_meant(_config(ModelConfig(path="x"), "evaluate", evaluate=sets, rollout=longer)) == []


def test_a_stage_that_asks_otherwise_than_the_one_that_trains_its_model_says_so(tmp_path: Path) -> None:
    """All of a chain is planned before the first of its runs is there."""
    others = {
        tmp_path / "sft": _config(ModelConfig(path="base", system_prompt="Think."), "sft"),
        tmp_path / "base": _config(ModelConfig(path="base", system_prompt="Think."), "pretrain"),
    }
    model = ModelConfig(path=str(tmp_path / "sft" / "model"))
    later = _config(model, train=TrainConfig(lr=1e-6))
    (said,) = seldom_meant(later, others)
    assert said.startswith("model.system_prompt is None here, and was 'Think.' in sft, which trained")
    for folder in ("base/model", "sft/export", "other/model"):
        of_others = replace(later, model=ModelConfig(path=str(tmp_path / folder)))
        assert seldom_meant(of_others, others) == []


def test_checkpoints_that_do_not_fit_under_the_run_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunDir(tmp_path / "runs" / "one"), RunConfig(checkpoint=CheckpointConfig(keep=2))
    plan: Any = SimpleNamespace(checkpoint_bytes=90 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200 << 30))
    (note,) = little_room(config, run, plan)
    assert note.startswith("3 checkpoints of 90.0 GiB may exist there at once (checkpoint.keep=2), and")
    assert note.endswith(f"{tmp_path} has 200.0 GiB free: give a --run-root with more room")
    for checkpoint_bytes in (60 << 30, None):
        plan.checkpoint_bytes = checkpoint_bytes
        assert little_room(config, run, plan) == []
