"""The training loop: next-token prediction from shards, stopped at a step edge, resumed to the bit.

    outcome = run(job)      # on every rank; launch.run_rank calls it

One optimizer step is: read the rank's windows, forward and backward for each micro batch, DeepSpeed's
step, one small all-reduce that carries the loss, the wishes to stop or save, and proof of the data used.
Everything the loop decides, it decides from that sum, so all ranks decide alike.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import append_record, fsync_file
from r1hpc.base.rundir import RunDir
from r1hpc.base.units import format_bytes, format_duration
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema import Precision, RunConfig
from r1hpc.data.loader import BatchLoader, StepBatch
from r1hpc.data.order import SamplePlan
from r1hpc.data.reader import open_dataset
from r1hpc.plan.batch import solve_batch
from r1hpc.plan.hardware import peak_flops
from r1hpc.plan.model import load_model_config
from r1hpc.plan.shape import UnknownModelError, flops_per_token, model_shape
from r1hpc.telemetry.metrics import MetricWriter
from r1hpc.train.distributed import Group
from r1hpc.train.engine import (
    averaged_grad_norm,
    build_engine,
    check_precision,
    deepspeed_config,
    grad_norm,
    learning_rate,
    loss_scale,
    reports_grad_norm,
    set_learning_rate,
)
from r1hpc.train.errors import NonFiniteError
from r1hpc.train.model import build_model, next_token_loss
from r1hpc.train.snapshot import Identity, Snapshots, seed_streams
from r1hpc.train.stop import StopRequests
from r1hpc.train.watchdog import Watchdog


@dataclass(frozen=True)
class Job:
    """What `launch` hands to the loop."""

    config: RunConfig
    run: RunDir
    group: Group
    attempt: int
    token: str
    dataset_path: Path
    requests: StopRequests
    watchdog: Watchdog


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: FINISHED, or STOPPED after a save because `reason` asked for it."""

    finished: bool
    global_step: int
    last_committed_step: int | None
    reason: str = ""


@dataclass(frozen=True)
class Edge:
    """What all ranks know after a step: sums over the ranks, so the same everywhere."""

    loss: float
    stop: bool
    save: bool
    failed_ranks: int
    num_samples: int
    sample_sum: int
    checksum: int


@dataclass
class Session:
    """Everything the loop touches, built once per attempt."""

    job: Job
    engine: Any
    loader: BatchLoader
    snapshots: Snapshots
    metrics: MetricWriter
    first_step: int
    tokens_per_step: int
    flops_per_token: float | None
    peak_flops: float | None
    skipped_in_a_row: int = 0


def run(job: Job) -> Outcome:
    """Train until the last step or until asked to stop."""
    return train(set_up(job))


def set_up(job: Job) -> Session:
    """Open the data, choose the checkpoint, build the engine, load."""
    config, group, train_ = job.config, job.group, job.config.train
    check_precision(train_.precision)
    batch = solve_batch(
        train_.global_batch_size,
        train_.micro_batch_size,
        group.world_size,
        train_.gradient_accumulation_steps,
    )
    dataset = open_dataset(job.dataset_path, verify=config.data.verify)
    plan = SamplePlan(dataset.id, dataset.num_tokens, config.data.seq_len, config.data.seed)
    hf_config = load_model_config(config, dataset.vocab_size)
    identity = Identity(
        dataset_id=dataset.id,
        plan_hash=plan.plan_hash,
        global_batch_size=batch.global_batch_size,
        model=hashlib.sha256(json.dumps(hf_config, sort_keys=True).encode()).hexdigest()[:16],
        precision=train_.precision.value,
        zero_stage=config.deepspeed.zero_stage,
        world_size=group.world_size,
    )
    store = CheckpointStore(job.run.checkpoints, keep=config.checkpoint.keep)
    snapshots = Snapshots(store, group, job.attempt, job.token, identity, job.run.path)
    job.watchdog.beat("verifying checkpoints")
    checkpoint = snapshots.choose()
    job.watchdog.beat("building the model")
    network = build_model(config.model, hf_config, train_.seed)
    ds_config = deepspeed_config(
        config,
        batch,
        on_gpu=group.device.type == "cuda",
        load_universal=snapshots.needs_conversion(checkpoint),
    )
    engine = build_engine(network, ds_config)
    seed_streams(train_.seed, 0, group.rank)
    step = 0
    if checkpoint is not None:
        job.watchdog.beat("loading the checkpoint")
        step = snapshots.load(engine, checkpoint)
    metrics = MetricWriter(job.run, job.attempt)
    if group.rank == 0:
        print(_opening_line(job, dataset.id, batch.gradient_accumulation_steps, step), flush=True)
        metrics.event("resume" if step else "fresh", global_step=step)
    loader = BatchLoader(
        dataset,
        plan,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=group.rank,
        world_size=group.world_size,
    )
    return Session(
        job=job,
        engine=engine,
        loader=loader,
        snapshots=snapshots,
        metrics=metrics,
        first_step=step + 1,
        tokens_per_step=batch.global_batch_size * config.data.seq_len,
        flops_per_token=_flops_per_token(hf_config, config.data.seq_len),
        peak_flops=_peak_flops(group),
    )


def train(session: Session) -> Outcome:
    """The loop itself."""
    job, snapshots = session.job, session.snapshots
    last_step = job.config.train.num_steps
    edge = agree(session, loss=0.0, batch=None)
    step = session.first_step - 1
    while step < last_step and not edge.stop:
        step += 1
        edge = train_step(session, step)
        due = step % job.config.checkpoint.save_every == 0 or step == last_step
        if due or edge.save or edge.stop:
            save(session, step, hurry=edge.stop)
    finished = step >= last_step
    return Outcome(finished, step, snapshots.last_committed_step, "" if finished else job.requests.reason)


def train_step(session: Session, step: int) -> Edge:
    """One optimizer step on the samples of `step`."""
    job, engine = session.job, session.engine
    started = time.monotonic()
    job.watchdog.beat(f"reading data of step {step}")
    # Step s consumes the samples [(s-1) x global_batch_size, s x global_batch_size).
    batch = session.loader.batch(step - 1)
    data_time_s = time.monotonic() - started
    job.watchdog.beat(f"step {step}")
    failpoint("step.begin")
    rate = learning_rate(job.config.train, step)
    set_learning_rate(engine, rate)
    skipped_before = engine.skipped_steps
    loss, norm = forward_backward(session, batch)
    skipped = engine.skipped_steps > skipped_before
    edge = agree(session, loss=loss, batch=batch)
    check_finite(session, step, edge, loss, norm, skipped)
    if job.group.rank == 0:
        record(session, step, edge, norm, rate, skipped, time.monotonic() - started, data_time_s)
    return edge


def forward_backward(session: Session, batch: StepBatch) -> tuple[float, float]:
    """All micro batches of a step and DeepSpeed's optimizer step.

    Returns: this rank's mean loss, and the gradient norm over all ranks before clipping.
    """
    engine, device = session.engine, session.job.group.device
    total, norm = torch.zeros((), device=device), None
    for micro_batch in torch.from_numpy(batch.tokens).to(device):
        logits = engine(input_ids=micro_batch[:, :-1]).logits
        loss = next_token_loss(logits, micro_batch[:, 1:])
        engine.backward(loss)
        if not reports_grad_norm(engine) and engine.is_gradient_accumulation_boundary():
            norm = averaged_grad_norm(engine)
        engine.step()
        total += loss.detach()
    return float(total) / len(batch.tokens), grad_norm(engine) if norm is None else norm


def agree(session: Session, loss: float, batch: StepBatch | None) -> Edge:
    """Sum what every rank knows: the one collective of our own in a step."""
    job, group = session.job, session.job.group
    stop, save = job.requests.poll()
    bad = not math.isfinite(loss)
    mine = [0.0 if bad else loss, stop, save, bad]
    mine += [0, 0, 0] if batch is None else [batch.sample_ids.size, batch.sample_ids.sum(), batch.checksum]
    loss_sum, stops, saves, bads, samples, sample_sum, checksum = group.all_sum([float(v) for v in mine])
    return Edge(
        loss=loss_sum / group.world_size if not bads else math.nan,
        stop=stops > 0,
        save=saves > 0,
        failed_ranks=int(bads),
        num_samples=int(samples),
        sample_sum=int(sample_sum),
        checksum=int(checksum),
    )


def check_finite(session: Session, step: int, edge: Edge, loss: float, norm: float, skipped: bool) -> None:
    """End the run on NaN, infinity or an exploded gradient: the last checkpoint is from before it."""
    train_, group = session.job.config.train, session.job.group
    fp16_overflow = train_.precision is Precision.fp16 and skipped
    session.skipped_in_a_row = session.skipped_in_a_row + 1 if fp16_overflow else 0
    if session.skipped_in_a_row > train_.max_skipped_steps:
        raise NonFiniteError(
            f"step {step}: fp16 overflowed {session.skipped_in_a_row} times in a row "
            f"(train.max_skipped_steps={train_.max_skipped_steps}); use bf16, or lower train.lr"
        )
    if edge.failed_ranks:
        ranks = [rank for rank, bad in enumerate(group.gather(not math.isfinite(loss))) if bad]
        raise NonFiniteError(f"step {step}: the loss is not finite on rank {', '.join(map(str, ranks))}")
    if not fp16_overflow and not norm <= train_.stop_grad_norm:
        raise NonFiniteError(
            f"step {step}: the gradient norm is {norm:g}, above train.stop_grad_norm="
            f"{train_.stop_grad_norm:g}: lower train.lr, or look at the data of this step"
        )


def save(session: Session, step: int, hurry: bool) -> None:
    """Commit the state after `step`, with the metrics and the ledger up to it durable first."""
    job, snapshots = session.job, session.snapshots
    if snapshots.last_committed_step == step:
        return
    job.watchdog.beat(f"saving step {step}")
    if job.group.rank == 0:
        for path in (job.run.train_metrics, _ledger_path(job)):
            fsync_file(path)
    meta = {
        "global_step": step,
        "next_sample": step * job.config.train.global_batch_size,
        "seed": job.config.train.seed,
        "num_nodes": job.config.resources.nodes,
        "torch": torch.__version__,
    }
    seconds = snapshots.save(session.engine, step, meta, hurry=hurry)
    job.requests.saved()
    job.watchdog.beat(f"after saving step {step}")
    if job.group.rank == 0:
        session.metrics.event("save", global_step=step, seconds=seconds, bytes=snapshots.last_bytes)
        size = format_bytes(snapshots.last_bytes)
        print(f"saved step {step}: {size} in {format_duration(seconds)}", flush=True)


def record(
    session: Session,
    step: int,
    edge: Edge,
    norm: float,
    rate: float,
    skipped: bool,
    step_time_s: float,
    data_time_s: float,
) -> None:
    """The step's lines in metrics/train.jsonl and ledger/, and now and then one for a person."""
    job, train_ = session.job, session.job.config.train
    tokens_per_second = session.tokens_per_step / step_time_s
    mfu = None
    if session.flops_per_token and session.peak_flops:
        available = session.peak_flops * job.group.world_size
        mfu = session.flops_per_token * tokens_per_second / available
    session.metrics.step(
        global_step=step,
        loss=edge.loss,
        grad_norm=norm,
        lr=rate,
        tokens=step * session.tokens_per_step,
        step_time_s=step_time_s,
        data_time_s=data_time_s,
        tokens_per_second=tokens_per_second,
        mfu=mfu,
        loss_scale=loss_scale(session.engine, train_.precision),
        skipped=skipped,
    )
    used = {
        "global_step": step,
        "attempt": job.attempt,
        "first_sample": (step - 1) * train_.global_batch_size,
        "num_samples": edge.num_samples,
        "sample_sum": edge.sample_sum,
        "checksum": edge.checksum,
    }
    append_record(_ledger_path(job), used, durable=False)
    if step % train_.print_every == 0 or step in (session.first_step, train_.num_steps):
        left = format_duration((train_.num_steps - step) * step_time_s)
        line = f"step {step}/{train_.num_steps}  loss {edge.loss:.4f}  grad {norm:.3f}  lr {rate:.2e}"
        line += f"  {tokens_per_second:,.0f} tok/s" + (f"  MFU {mfu:.1%}" if mfu else "")
        print(f"{line}  {left} left", flush=True)


def _ledger_path(job: Job) -> Path:
    return job.run.ledger / f"attempt_{job.attempt}.jsonl"


def _flops_per_token(hf_config: dict[str, Any], seq_len: int) -> float | None:
    try:
        return flops_per_token(model_shape(hf_config), seq_len)
    except UnknownModelError:
        return None


def _peak_flops(group: Group) -> float | None:
    if group.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(group.device))


def _opening_line(job: Job, dataset_id: str, accumulation: int, step: int) -> str:
    group = job.group
    start = f"resuming after step {step}" if step else "starting"
    return (
        f"attempt {job.attempt}: {start} on {group.world_size} rank(s), {group.device.type}, "
        f"ZeRO {job.config.deepspeed.zero_stage}, {job.config.train.precision.value}, "
        f"accumulation {accumulation}, dataset {dataset_id[:12]}"
    )
