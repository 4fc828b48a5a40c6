"""Whole runs on a base in 4 bits, submitted as a user submits them: interrupted they are the same runs."""

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.text.tokenizer import load_tokenizer, vocabulary_size
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.runs import (
    assert_same_run,
    at,
    command_output,
    contents,
    held,
    kill_rank,
    submit,
    until_stopped,
    wait_attempt,
    wait_over,
    wait_step,
)

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("qlora")]
RL = ("rl.kl_coef=0.05", "train.num_steps=6", "evaluate.every=0", "checkpoint.save_every=2")


def base(folder: Path) -> tuple[str, ...]:
    """Words that put a run on a small model of random weights, in 4 bits."""
    path = folder / "base"
    if not path.exists():
        config = load.load("rl_smoke", ["model.config.n_embd=64"])
        shape = load_model_config(config, vocabulary_size(load_tokenizer(config.model)))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(path)
    quantized = ("model.lora_rank=4", "model.base_quantization=nf4")
    return (f"model.path={path}", "model.tokenizer=characters", *quantized)


def finished(run: RunDir) -> RunDir:
    assert wait_over(run)[-1].cause is Cause.finished
    return run


def sft(root: Path, name: str, *words: str, env: dict[str, str] | None = None) -> RunDir:
    traces = root / "traces.jsonl"
    lines = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(8) for b in range(8)]
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["stage=sft", f'data.traces=["{traces}"]', "data.seq_len=24", "train.num_steps=12"]
    asked += ["checkpoint.save_every=5", "train.precision=bf16", "deepspeed.zero_stage=2"]
    return submit(root, name, *asked, *base(root), *words, job="jobs/rl_smoke.yaml", env=env).run


def test_stopped_fine_tuning_goes_on_to_the_bit_and_is_exported_as_it_ended(tmp_path: Path) -> None:
    undisturbed = finished(sft(tmp_path, "undisturbed"))
    stopped = sft(tmp_path, "stopped", env=until_stopped(tmp_path / "stopped", 4))
    wait_step(stopped, 3)
    stopped.stop.touch()
    assert wait_over(stopped)[-1].cause is Cause.stopped
    submit(tmp_path, "stopped", "--resume")
    assert_same_run(finished(stopped), undisturbed)
    out = tmp_path / "out"  # of the newest checkpoint, by one process that rounds the base once more
    command_output(["-m", "r1hpc.export", str(stopped.path), "--out", str(out), "--step", "12"])
    made = contents(out)
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= set(made)
    assert made == contents(undisturbed.model)


@pytest.mark.soak
def test_killed_reinforcement_learning_goes_on_to_the_bit(tmp_path: Path) -> None:
    words = (*RL, "deepspeed.zero_stage=2", *base(tmp_path))
    undisturbed = finished(submit(tmp_path, "undisturbed", *words, job="jobs/rl_smoke.yaml").run)
    go = tmp_path / "go"
    killed = submit(tmp_path, "killed", *words, job="jobs/rl_smoke.yaml", env=at(held(go, 4, rank=0))).run
    wait_step(killed, 3)
    kill_rank(killed, 1, signal.SIGKILL)
    go.touch()
    wait_attempt(killed, 2)
    assert_same_run(finished(killed), undisturbed)
    steps = read_steps(killed).effective.values()
    assert max(step.value("kl") or 0 for step in steps) > 0, "it moved away from the base without adapters"
