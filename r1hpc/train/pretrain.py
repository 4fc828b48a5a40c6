"""Pretraining: next-token prediction on windows of sharded text.

    outcome = run(job)      # on every rank

One optimizer step is: read the rank's windows, forward and backward for each micro batch, DeepSpeed's step,
and one small all-reduce that also proves which samples were used.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from r1hpc.base.failpoints import failpoint
from r1hpc.data.loader import BatchLoader, StepBatch
from r1hpc.data.mixture import open_plan
from r1hpc.data.reader import open_dataset
from r1hpc.plan.batch import solve_batch
from r1hpc.plan.model import load_model_config
from r1hpc.train import loop
from r1hpc.train.engine import accumulate, learning_rate, set_learning_rate
from r1hpc.train.loop import Job, Outcome, Session, StepResult
from r1hpc.train.model import build_model, next_token_loss


def run(job: Job) -> Outcome:
    """Train until the last step or until asked to stop."""
    loop.check_device(job)
    stage, plan = open_stage(job)
    return loop.train(loop.set_up(job, stage, plan), stage)


def open_stage(job: Job) -> "tuple[Pretraining, loop.Plan]":
    """Open the data and build the model."""
    config, group, train_ = job.config, job.group, job.config.train
    assert job.dataset_path is not None, "begin sees to the dataset"
    batch = solve_batch(
        train_.global_batch_size,
        train_.micro_batch_size,
        group.world_size,
        train_.gradient_accumulation_steps,
    )
    dataset = open_dataset(job.dataset_path, verify=config.data.verify)
    plan = open_plan(
        dataset,
        config.data.seq_len,
        config.data.seed,
        batch.global_batch_size,
        num_samples=train_.num_steps * batch.global_batch_size,
    )
    hf_config = load_model_config(config, dataset.vocab_size)
    job.watchdog.beat("building the model")
    loader = BatchLoader(
        dataset,
        plan,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=group.rank,
        world_size=group.world_size,
    )
    return Pretraining(job, loader), loop.Plan(
        network=build_model(config.model, hf_config, train_.seed),
        hf_config=hf_config,
        batch=batch,
        data_id=dataset.id,
        order_id=plan.plan_hash,
    )


class Pretraining:
    """The stage: its only state is the step, from which the samples follow."""

    def __init__(self, job: Job, loader: BatchLoader) -> None:
        self._job = job
        self._loader = loader

    def take_step(self, session: Session, step: int) -> StepResult:
        """One optimizer step on the samples of `step`."""
        job, engine, train_ = self._job, session.engine, self._job.config.train
        started = time.monotonic()
        job.watchdog.beat(f"reading data of step {step}")
        # Step s consumes the samples [(s-1) x global_batch_size, s x global_batch_size).
        batch = self._loader.batch(step - 1)
        data_time_s = time.monotonic() - started
        job.watchdog.beat(f"step {step}")
        failpoint("step.begin")
        rate = learning_rate(train_, step)
        set_learning_rate(engine, rate)
        skipped_before = engine.skipped_steps
        total, norm, forward_s = accumulate(engine, self._losses(engine, batch))
        loss = total / len(batch.tokens)
        skipped = engine.skipped_steps > skipped_before
        proof = [float(v) for v in (batch.sample_ids.size, batch.sample_ids.sum(), batch.checksum)]
        edge = loop.agree(session, loss, proof)
        loop.check_finite(session, step, edge, loss, norm, skipped)
        step_time_s = time.monotonic() - started
        session.rank_times.step(step, step_time_s, data_time_s + forward_s)
        if job.group.rank == 0:
            seq_len = job.config.data.seq_len
            tokens = session.batch.global_batch_size * seq_len
            per_token = loop.model_flops_per_token(session.hf_config, seq_len)
            done = loop.StepRecord(
                loss=edge.loss,
                grad_norm=norm,
                lr=rate,
                tokens=step * tokens,
                step_tokens=tokens,
                step_time_s=step_time_s,
                data_time_s=data_time_s,
                skipped=skipped,
                flops=None if per_token is None else per_token * tokens,
            )
            loop.record(session, step, done, self._used(step, edge))
        return edge

    def meta(self, step: int) -> dict[str, Any]:
        return {"next_sample": step * self._job.config.train.global_batch_size}

    def write_state(self, folder: Path) -> None:
        """Nothing: the order of the data is a function of the step."""

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Nothing, as written."""

    def finish(self, session: Session) -> bool:
        return True

    def kept(self, step: int) -> int:
        return 0

    def _losses(self, engine: Any, batch: StepBatch) -> Iterator[torch.Tensor]:
        """The mean loss of each micro batch."""
        for micro_batch in torch.from_numpy(batch.tokens).to(self._job.group.device):
            logits = engine(input_ids=micro_batch[:, :-1]).logits
            yield next_token_loss(logits, micro_batch[:, 1:])

    def _used(self, step: int, edge: StepResult) -> dict[str, Any]:
        num_samples, sample_sum, checksum = map(int, edge.sums)
        return {
            "first_sample": (step - 1) * self._job.config.train.global_batch_size,
            "num_samples": num_samples,
            "sample_sum": sample_sum,
            "checksum": checksum,
        }
