"""Whole runs of stage sft on two ranks: packed it trains as padded, and a resume is to the bit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema.run import DataConfig, RunConfig
from r1hpc.data.read.sft_documents import TraceDataset, hold_out, open_traces
from r1hpc.data.read.sft_loader import TraceLoader
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_events, read_steps
from r1hpc.train.supervised.sft import _held_out
from tests.corpus.tracefiles import build_traces
from tests.runs import assert_same_run, submit, until_stopped, wait_over, wait_step

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("sft-packed")]
SIZE: tuple[str, ...] = (
    "stage=sft",
    "model.tokenizer=characters",
    "train.num_steps=12",
    "checkpoint.save_every=5",
)
SIZE += ("resources.ranks_per_node=2", "train.micro_batch_size=2", "train.precision=fp32", "train.lr=1e-3")


def traces(folder: Path) -> Path:
    """Sums of very different lengths."""
    rng = np.random.default_rng(0)
    lines = []
    for length in np.minimum(100, np.maximum(1, rng.lognormal(2.5, 0.7, 96).astype(int))):
        digits = "".join(map(str, rng.integers(0, 10, length)))
        lines.append(json.dumps({"prompt": f"{digits[:5]}=", "completion": digits}))
    path = folder / "traces.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(root: Path, name: str, *words: str, env: Any = None) -> RunDir:
    data = root / "traces.jsonl"
    if not data.exists():
        traces(root)
    return submit(root, name, *SIZE, f'data.traces=["{data}"]', *words, env=env).run


def test_packed_is_the_same_training_with_less_padding(tmp_path: Path) -> None:
    found = {}
    for packing in (False, True):
        done = run(tmp_path, f"packing-{packing}", f"data.packing={str(packing).lower()}")
        assert wait_over(done)[-1].cause is Cause.finished
        found[packing] = read_steps(done).effective.values()
    for padded, packed in zip(found[False], found[True], strict=True):
        assert packed.loss == pytest.approx(padded.loss, rel=1e-4)
        assert packed.tokens == padded.tokens
    shares = {key: [step.value("useful_share") for step in steps] for key, steps in found.items()}
    assert max(shares[False]) < 0.7
    assert min(shares[True]) > 0.9


def test_stopped_and_resumed_it_is_the_same_run_to_the_bit(tmp_path: Path) -> None:
    packing = ("data.packing=true", "deepspeed.zero_stage=2", "train.precision=bf16")
    undisturbed = run(tmp_path, "undisturbed", *packing)
    assert wait_over(undisturbed)[-1].cause is Cause.finished
    stopped = run(tmp_path, "stopped", *packing, env=until_stopped(tmp_path / "stopped", 4))
    wait_step(stopped, 3)
    stopped.stop.touch()
    assert wait_over(stopped)[-1].cause is Cause.stopped
    submit(tmp_path, "stopped", "--resume")
    assert wait_over(stopped)[-1].cause is Cause.finished
    assert_same_run(stopped, undisturbed)


def test_early_stopping_leaves_the_model_of_the_lowest_loss(tmp_path: Path) -> None:
    words: tuple[str, ...] = (
        "data.validation_documents=20",
        "train.validate_every=2",
        "train.early_stopping=2",
    )
    # A rate at which it soon learns the few traces by heart.
    words += ("train.lr=3e-2", "train.warmup_steps=1", "train.num_steps=200", "train.global_batch_size=8")
    # Asked to stop where a validation is due, and again in the one that the next attempt begins with.
    env = until_stopped(tmp_path / "early", 4)
    env["R1HPC_FAILPOINT"] += ",validate.rows:term:1:1:2"
    done = run(tmp_path, "early", *words, "data.packing=true", env=env)
    wait_step(done, 3)
    done.stop.touch()
    assert wait_over(done)[-1].cause is Cause.stopped
    submit(tmp_path, "early", "--resume", env=env)
    assert [a.cause for a in wait_over(done)] == [Cause.stopped, Cause.preempted, Cause.finished]
    losses = {
        step.global_step: step.value("validation_loss")
        for step in read_steps(done).effective.values()
        if step.value("validation_loss") is not None
    }
    (late,) = [event for event in read_events(done) if event["event"] == "validation"]
    assert late["global_step"] == 4
    assert 4 not in losses
    losses = dict(sorted({**losses, 4: late["validation_loss"]}.items()))
    assert list(losses) == list(range(2, max(losses) + 1, 2))
    assert max(losses) < 200
    losses_in_order = list(losses.values())
    assert losses_in_order.index(min(losses_in_order)) == len(losses) - 3
    dataset = open_traces(json.loads((done.path / "attempts/1/attempt.json").read_text())["dataset_path"])
    held = hold_out(dataset, 20, 0).held_out.tolist()
    assert loss_of(AutoModelForCausalLM.from_pretrained(done.model), dataset, held) == pytest.approx(
        min(losses_in_order), rel=1e-4
    )
    seen = {int(number) for step in range(6) for number in loader_of(dataset).batch(step).document_ids.flat}
    assert not seen & set(held)


def test_a_run_that_trained_on_siblings_of_what_it_held_out_goes_on_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began when nobody looked for them: its checkpoints are of another order. Ranks and manifest are
    mocks here."""
    asked = [(f"{number // 4}=", f"{number}") for number in range(96)]
    job = SimpleNamespace(
        config=RunConfig(stage="sft", data=DataConfig(validation_documents=6)),
        run=RunDir(tmp_path / "run"),
        group=SimpleNamespace(rank=0, broadcast=lambda value: value),
        watchdog=SimpleNamespace(beat=lambda phase: None),
    )
    dataset = open_traces(build_traces(tmp_path, asked).path)
    new = _held_out(cast("Any", job), dataset, lambda parting: f"order {len(parting.siblings)}")
    assert new is not None
    assert len(new.siblings) >= 3
    of_before = SimpleNamespace(manifest=SimpleNamespace(meta={"plan_hash": "order 0"}))
    monkeypatch.setattr(CheckpointStore, "list", lambda self: [of_before])
    old = _held_out(cast("Any", job), dataset, lambda parting: f"order {len(parting.siblings)}")
    assert old == replace(new, siblings=())


def loader_of(dataset: TraceDataset) -> TraceLoader:
    sizes: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    return TraceLoader(dataset, **sizes, seed=0, pad_id=0, seq_len=256, parting=hold_out(dataset, 20, 0))


@torch.no_grad()
def loss_of(network: Any, dataset: TraceDataset, documents: list[int]) -> float:
    """Document by document, over the tokens of the completions."""
    total, num = 0.0, 0
    for number in documents:
        ids, prompt = dataset.read_document(number)
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = network(input_ids=tokens[None]).logits[0].float()
        targets = tokens[prompt:]
        total -= float(logits[prompt - 1 : -1].log_softmax(-1).gather(-1, targets[:, None]).sum())
        num += len(targets)
    return total / num
