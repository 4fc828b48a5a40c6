"""Supervised fine-tuning: next-token prediction on the completions of prompt and completion pairs.

    outcome = run(job)      # on every rank

The roles stored in the shards say which tokens are a completion; only those have a loss. It is the mean over
all completion tokens of the global batch, so it does not depend on how rows were spread over ranks.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from r1hpc.base.failpoints import failpoint
from r1hpc.data.trace_loader import TraceBatch, TraceLoader
from r1hpc.data.traces import open_traces
from r1hpc.plan.batch import solve_batch
from r1hpc.plan.model import load_model_config
from r1hpc.tasks.tokenizer import load_tokenizer, special_ids
from r1hpc.train import loop
from r1hpc.train.engine import accumulate, learning_rate, set_learning_rate
from r1hpc.train.export import export_model
from r1hpc.train.loop import Job, Outcome, Session, StepResult
from r1hpc.train.policy import build_policy


def run(job: Job) -> Outcome:
    """Train until the last step or until asked to stop."""
    loop.check_device(job)
    stage, plan = open_stage(job)
    return loop.train(loop.set_up(job, stage, plan), stage)


def open_stage(job: Job) -> "tuple[FineTuning, loop.Plan]":
    """Open the traces and build the model."""
    config, group, train_ = job.config, job.group, job.config.train
    assert job.dataset_path is not None, "begin sees to the dataset"
    batch = solve_batch(
        train_.global_batch_size,
        train_.micro_batch_size,
        group.world_size,
        train_.gradient_accumulation_steps,
    )
    tokenizer = load_tokenizer(config.model)
    dataset = open_traces(job.dataset_path, verify=config.data.verify)
    loader = TraceLoader(
        dataset,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        seed=config.data.seed,
        pad_id=special_ids(tokenizer, config.model).pad,
        seq_len=config.data.seq_len,
    )
    hf_config = load_model_config(config, tokenizer.get_vocab_size())
    job.watchdog.beat("building the model")
    return FineTuning(job, loader), loop.Plan(
        network=build_policy(config, hf_config),
        hf_config=hf_config,
        batch=batch,
        data_id=dataset.id,
        order_id=loader.plan_hash,
    )


class FineTuning:
    """The stage: its only state is the step, from which the documents follow."""

    def __init__(self, job: Job, loader: TraceLoader) -> None:
        self._job = job
        self._loader = loader
        self._tokens = 0

    def take_step(self, session: Session, step: int) -> StepResult:
        """One optimizer step on the traces of `step`."""
        job, engine, train_ = self._job, session.engine, self._job.config.train
        started = time.monotonic()
        job.watchdog.beat(f"reading data of step {step}")
        batch = self._loader.batch(step - 1)
        data_time_s = time.monotonic() - started
        job.watchdog.beat(f"step {step}")
        failpoint("step.begin")
        rate = learning_rate(train_, step)
        set_learning_rate(engine, rate)
        skipped_before = engine.skipped_steps
        total, norm, forward_s = accumulate(engine, self._losses(engine, batch))
        loss = total / session.batch.gradient_accumulation_steps
        skipped = engine.skipped_steps > skipped_before
        proof = [batch.sample_ids.size, int(batch.sample_ids.sum()), batch.checksum]
        edge = loop.agree(session, loss, [float(v) for v in proof])
        loop.check_finite(session, step, edge, loss, norm, skipped)
        self._tokens += batch.num_loss_tokens
        step_time_s = time.monotonic() - started
        session.rank_times.step(step, step_time_s, data_time_s + forward_s)
        if job.group.rank == 0:
            per_token = loop.model_flops_per_token(session.hf_config, batch.tokens.shape[-1])
            positions = session.batch.global_batch_size * batch.tokens.shape[-1]
            done = loop.StepRecord(
                loss=edge.loss,
                grad_norm=norm,
                lr=rate,
                tokens=self._tokens,
                step_tokens=batch.num_loss_tokens,
                step_time_s=step_time_s,
                data_time_s=data_time_s,
                skipped=skipped,
                flops=None if per_token is None else per_token * positions,
            )
            loop.record(session, step, done, self._used(step, edge))
        return edge

    def meta(self, step: int) -> dict[str, Any]:
        next_sample = step * self._job.config.train.global_batch_size
        return {"next_sample": next_sample, "tokens": self._tokens}

    def write_state(self, folder: Path) -> None:
        """Nothing: the order of the data is a function of the step."""

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        self._tokens = int(meta["tokens"])

    def finish(self, session: Session) -> bool:
        """Leave the model as a Hugging Face folder, for the stages that follow."""
        job = self._job
        job.watchdog.beat("exporting the model")
        export_model(session.engine.module, job.group, job.run.model, load_tokenizer(job.config.model))
        return True

    def kept(self, step: int) -> int:
        return 0

    def _losses(self, engine: Any, batch: TraceBatch) -> Iterator[torch.Tensor]:
        """Each micro batch's part of the mean over all completion tokens of the global batch."""
        group = self._job.group
        # DeepSpeed takes the mean over micro batches and ranks; here the sum over both is the mean wanted.
        weight = len(batch.tokens) * group.world_size / batch.num_loss_tokens
        micro_batches = zip(
            torch.from_numpy(batch.tokens).to(group.device),
            torch.from_numpy(batch.loss_mask).to(group.device),
            strict=True,
        )
        for tokens, mask in micro_batches:
            logits = engine(input_ids=tokens[:, :-1]).logits
            chosen = mask[:, 1:]
            total = F.cross_entropy(logits[chosen].float(), tokens[:, 1:][chosen], reduction="sum")
            yield total * weight

    def _used(self, step: int, edge: StepResult) -> dict[str, Any]:
        num_samples, sample_sum, checksum = map(int, edge.sums)
        return {
            "first_sample": (step - 1) * self._job.config.train.global_batch_size,
            "num_samples": num_samples,
            "sample_sum": sample_sum,
            "checksum": checksum,
        }
