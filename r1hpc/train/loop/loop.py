"""Run the training loop shared by all stages: step, agree, save, stop between steps, resume bit by bit.

A stage brings the network, the data and a step's losses. The loop brings the engine, the optimizer step
(`optimizer_step`, called by each stage's `take_step`), checkpoints, the agreement of all ranks, and the
records. It decides everything from one sum over the ranks, so all ranks decide alike.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from r1hpc.attempt.workload import Outcome
from r1hpc.base.files import append_record, fsync_dir, fsync_file
from r1hpc.base.units import format_bytes, format_duration
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.client.streams import seed_streams
from r1hpc.config.schema.run import Precision
from r1hpc.plan.model.families import UnknownModelError
from r1hpc.plan.model.shape import flops_per_token, model_shape
from r1hpc.plan.topology.gpus import peak_flops
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.train.checkpoint.identity import Identity, base_facts, compression_of, precision_of
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.loop.session import Agreement, Job, Plan, Session, Stage, StepRecord, StepResult
from r1hpc.train.parallel.compression import Compressor, exchange_of
from r1hpc.train.parallel.distributed import RankTimes
from r1hpc.train.parallel.engine import (
    accumulate,
    build_engine,
    deepspeed_config,
    learning_rate,
    loss_scale,
    set_learning_rate,
)
from r1hpc.train.parallel.errors import NonFiniteError


def set_up(job: Job, stage: Stage, plan: Plan) -> Session:
    """Choose the checkpoint, build the engine, and load the state of the engine and the stage."""
    config, group = job.config, job.group
    identity = Identity(
        dataset_id=plan.data_id,
        plan_hash=plan.order_id,
        global_batch_size=plan.batch.global_batch_size,
        model=hashlib.sha256(json.dumps(plan.hf_config, sort_keys=True).encode()).hexdigest()[:16],
        precision=precision_of(config.train, config.model.base_quantization),
        zero_stage=config.deepspeed.zero_stage,
        world_size=group.world_size,
        facts={
            **plan.facts,
            **base_facts(config, group),
            "gradient_compression": compression_of(config.train),
        },
    )
    store = CheckpointStore(job.run.checkpoints, keep=config.checkpoint.keep)
    snapshots = Snapshots(
        store,
        group,
        job.attempt,
        job.token,
        identity,
        job.run.path,
        asynchronous=config.checkpoint.asynchronous,
        ranks_per_node=max(1, group.world_size // config.resources.nodes),
        beat=job.watchdog.beat,
        hang_timeout_s=config.train.hang_timeout_s,
    )
    job.watchdog.before_leaving = snapshots.settle
    job.watchdog.beat("verifying checkpoints")
    checkpoint = snapshots.choose()
    job.watchdog.beat("building the engine")
    ds_config = deepspeed_config(
        config,
        world_size=group.world_size,
        on_gpu=group.device.type == "cuda",
        load_universal=snapshots.needs_conversion(checkpoint),
    )
    engine = build_engine(plan.network, ds_config, plan.parameters)
    exchange = exchange_of(config.train, engine, group)
    if isinstance(exchange, Compressor):
        snapshots.carry(exchange)
    seed_streams(config.train.seed, 0, group.rank)
    step = 0
    if checkpoint is not None:
        job.watchdog.beat("loading the checkpoint")
        checkpoint = snapshots.load(engine, checkpoint)
        step = checkpoint.step
        stage.read_state(checkpoint.path, checkpoint.manifest.meta)
    metrics = MetricWriter(job.run, job.attempt)
    if group.rank == 0:
        print(_opening_line(job, plan, step), flush=True)
        metrics.event("resume" if step else "fresh", global_step=step)
    on_gpu = group.device.type == "cuda"
    return Session(
        job=job,
        engine=engine,
        snapshots=snapshots,
        metrics=metrics,
        batch=plan.batch,
        first_step=step + 1,
        hf_config=plan.hf_config,
        peak_flops=peak_flops(torch.cuda.get_device_name(group.device)) if on_gpu else None,
        rank_times=RankTimes(job.run, job.attempt, job.node, group),
        exchange=exchange,
    )


def train(session: Session, stage: Stage) -> Outcome:
    """Step until the last step or a stop request; then finish the stage."""
    job, last_step, step = session.job, session.job.config.train.num_steps, session.first_step - 1
    try:
        stop = not stage.begin(session)
        if stop:
            _save(session, stage, step, hurry=True)
        else:
            stop = agree(session).stop
        while step < last_step and not stop and not stage.is_done:
            result = stage.take_step(session, step + 1)
            if result is None:
                _save(session, stage, step, hurry=True)
                stop = True
                break
            step, stop = step + 1, result.stop
            is_last = step == last_step or stage.is_done
            due = step % job.config.checkpoint.save_every == 0 or is_last
            if due or result.save or result.stop:
                _save(session, stage, step, hurry=result.stop)
        _finish_save(session)
        finished = (step >= last_step or stage.is_done) and not stop and stage.finish(session)
    except Exception:
        session.snapshots.settle()
        raise
    committed = session.snapshots.last_committed_step
    if finished:
        return Outcome(True, step, committed)
    reason = next(filter(None, job.group.gather(job.requests.reason)), "")
    return Outcome(False, step, committed, reason, stage.kept(step))


def optimizer_step(
    session: Session, step: int, losses: Iterable[torch.Tensor], sums: Callable[[], Sequence[float]]
) -> StepResult:
    """Run forward and backward for each micro batch, DeepSpeed's step, and the agreement of all ranks on it.

    `losses` runs the forward passes one by one, and tells the engine of each whether it is the last
    (set_gradient_accumulation_boundary). `sums` returns more numbers to add up over the ranks; it is called
    after the last loss. Raise NonFiniteError if the loss or the gradients are not finite, or exploded.
    """
    engine, rate = session.engine, learning_rate(session.job.config.train, step)
    set_learning_rate(engine, rate)
    skipped_before = engine.skipped_steps
    try:
        loss, norm, forward_s = accumulate(engine, _alive(session, step, losses))
    except Exception as error:
        if "loss scale already at minimum" not in str(error):  # DeepSpeed's words, on all ranks
            raise
        raise NonFiniteError(
            f"step {step}: fp16 overflows at the smallest loss scale: use bf16, or lower train.lr"
        ) from None
    skipped = engine.skipped_steps > skipped_before
    agreed = agree(session, loss, sums())
    _check_finite(session, step, agreed, loss, norm, skipped)
    return StepResult(agreed.loss, norm, rate, skipped, agreed.stop, agreed.save, agreed.sums, forward_s)


def _alive(session: Session, step: int, losses: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Beat the watchdog with each loss: an update of long completions may outlast the hang timeout."""
    for loss in losses:
        session.job.watchdog.beat(f"update of step {step}")
        yield loss


def agree(session: Session, loss: float = 0.0, sums: Sequence[float] = ()) -> Agreement:
    """Sum over the ranks what each knows: our only collective in a step. If a checkpoint's write has ended,
    it is recorded, or its failure is raised on all ranks. `loss` is this rank's; `sums` are more numbers to
    add up over the ranks, equally many on each."""
    job, group = session.job, session.job.group
    is_over = session.snapshots.is_over
    stop, save = job.requests.poll()
    # A separate flag counts the ranks: a sum that is nan would not tell how many.
    bad = not math.isfinite(loss)
    mine = [0.0 if bad else loss, float(stop), float(save), float(bad), float(is_over), *sums]
    loss_sum, stops, saves, bads, over, *summed = group.all_sum(mine)
    if over:
        _finish_save(session)
    return Agreement(
        loss=loss_sum / group.world_size if not bads else math.nan,
        stop=stops > 0,
        save=saves > 0,
        failed_ranks=int(bads),
        sums=tuple(summed),
    )


def _check_finite(
    session: Session, step: int, agreed: Agreement, loss: float, norm: float, skipped: bool
) -> None:
    """End the run on NaN, infinity or an exploded gradient: the last checkpoint is from before it."""
    train_, group = session.job.config.train, session.job.group
    # On an fp16 overflow DeepSpeed skips the step and halves the loss scale: a few are normal.
    fp16_overflow = train_.precision is Precision.fp16 and skipped
    session.skipped_in_a_row = session.skipped_in_a_row + 1 if fp16_overflow else 0
    if session.skipped_in_a_row > train_.max_skipped_steps:
        raise NonFiniteError(
            f"step {step}: fp16 overflowed {session.skipped_in_a_row} times in a row "
            f"(train.max_skipped_steps={train_.max_skipped_steps}); use bf16, or lower train.lr"
        )
    if agreed.failed_ranks:
        ranks = [rank for rank, bad in enumerate(group.gather(not math.isfinite(loss))) if bad]
        raise NonFiniteError(f"step {step}: the loss is not finite on rank {', '.join(map(str, ranks))}")
    if skipped and not fp16_overflow:  # the norm then depends on DeepSpeed's version
        raise NonFiniteError(
            f"step {step}: DeepSpeed skipped the update, since gradients were not finite: lower train.lr, "
            "or look at the data of this step"
        )
    if not fp16_overflow and not norm <= train_.stop_grad_norm:  # `not <=` also catches nan
        raise NonFiniteError(
            f"step {step}: the gradient norm is {norm:g}, above train.stop_grad_norm="
            f"{train_.stop_grad_norm:g}: lower train.lr, or look at the data of this step"
        )


def _save(session: Session, stage: Stage, step: int, hurry: bool) -> None:
    """Save the state after `step`. In a hurry it is committed on return, else perhaps only copied."""
    job, snapshots = session.job, session.snapshots
    if snapshots.step_being_written != step:
        if hurry:
            snapshots.make_way(job.requests.seconds_left())
        _finish_save(session, hurry=hurry)
        if snapshots.last_committed_step != step:
            job.watchdog.beat(f"saving step {step}")
            meta: dict[str, Any] = {"global_step": step, "seed": job.config.train.seed}
            meta |= {"num_nodes": job.config.resources.nodes, **stage.meta(step)}
            snapshots.save(
                session.engine,
                step,
                meta,
                hurry=hurry,
                write_more=stage.state_writer(),
                make_durable=partial(_sync_records, job),
            )
            job.requests.saving()
            job.watchdog.beat(f"after saving step {step}")
    if hurry or not job.config.checkpoint.asynchronous:
        _finish_save(session, hurry=hurry)


def _sync_records(job: Job) -> None:
    """Make metrics and ledger durable: a checkpoint must not know of steps that they lack."""
    for path in (job.run.train_metrics, ledger_path(job)):
        if path.exists():  # a run that stops before its first step has neither
            fsync_file(path)
            fsync_dir(path.parent)


def _finish_save(session: Session, *, hurry: bool = False) -> None:
    """Wait for the save under way, if any, and record it."""
    job, step = session.job, session.snapshots.step_being_written
    if step is None:
        return
    job.watchdog.beat(f"writing the checkpoint of step {step}")
    saved = session.snapshots.finish(hurry=hurry)
    job.watchdog.beat(f"after saving step {step}")
    if saved is None:
        return
    job.requests.saved()
    if job.group.rank == 0:
        blocked_s = saved.copy_s + saved.waited_s
        session.metrics.event(
            "save",
            global_step=step,
            seconds=blocked_s,
            waited_s=saved.waited_s,
            copied_at=saved.copied_at,
            write_s=saved.write_s,
            num_nodes=job.config.resources.nodes,
            bytes=saved.bytes,
        )
        took, blocked = format_duration(saved.copy_s + saved.write_s), format_duration(blocked_s)
        print(f"saved step {step}: {format_bytes(saved.bytes)} in {took}, waited {blocked}", flush=True)


def _opening_line(job: Job, plan: Plan, step: int) -> str:
    group = job.group
    start = f"resuming after step {step}" if step else "starting"
    shared = job.config.train.sequence_parallel
    sharing = f", {shared} of them to a sequence" if shared > 1 else ""
    return (
        f"attempt {job.attempt}: {start} on {group.world_size} rank(s){sharing}, {group.device.type}, "
        f"ZeRO {job.config.deepspeed.zero_stage}, "
        f"{precision_of(job.config.train, job.config.model.base_quantization)}, "
        f"accumulation {plan.batch.gradient_accumulation_steps}, data {plan.data_id[:24]}"
    )


def record(session: Session, step: int, result: StepResult, what: StepRecord) -> None:
    """Write the step's lines in metrics/train.jsonl and ledger/, and now and then a log line."""
    job, train_ = session.job, session.job.config.train
    tokens_per_second = what.step_tokens / what.step_time_s
    mfu = None
    if what.flops and session.peak_flops:
        mfu = what.flops / (what.step_time_s * session.peak_flops * job.group.world_size)
    session.metrics.step(
        global_step=step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
        tokens=what.tokens,
        step_time_s=what.step_time_s,
        data_time_s=what.data_time_s,
        tokens_per_second=tokens_per_second,
        mfu=mfu,
        loss_scale=loss_scale(session.engine, train_.precision),
        skipped=result.skipped,
        **what.extra,
        **({} if session.exchange is None else {"gradient_bytes": session.exchange.take_bytes()}),
    )
    used = {"global_step": step, "attempt": job.attempt, **what.used}
    append_record(ledger_path(job), used, durable=False)
    if step % train_.print_every == 0 or step in (session.first_step, train_.num_steps):
        left = format_duration((train_.num_steps - step) * what.step_time_s)
        line = f"step {step}/{train_.num_steps}  loss {result.loss:.4f}  grad {result.grad_norm:.3f}"
        line += f"  lr {result.lr:.2e}"
        if "reward" in what.extra:
            line += f"  reward {what.extra['reward']:.3f}  accuracy {what.extra['accuracy']:.3f}"
        line += f"  {tokens_per_second:,.0f} tok/s" + (f"  MFU {mfu:.1%}" if mfu else "")
        print(f"{line}  {left} left", flush=True)


def ledger_path(job: Job) -> Path:
    return job.run.ledger / f"attempt_{job.attempt}.jsonl"


def model_flops_per_token(hf_config: dict[str, Any], seq_len: int) -> float | None:
    """Return FLOPs of forward and backward per token, for MFU; None if the family cannot be counted."""
    try:
        return flops_per_token(model_shape(hf_config), seq_len)
    except UnknownModelError:
        return None
