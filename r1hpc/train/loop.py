"""The training loop every stage shares: take a step, agree, save, stop between two steps, resume to the bit.

    outcome = pretrain.run(job)          # or sft.run, rl.run: each builds a Stage and hands it to `train`

A stage brings the network, the data and the losses of a step; the loop brings the engine, the optimizer step
(`optimizer_step`, which each stage calls from its `take_step`), checkpoints, the agreement of all ranks and
the records. Everything the loop decides, it decides from one sum over the ranks, so all of them decide alike.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from r1hpc.base.files import append_record, fsync_file
from r1hpc.base.rundir import RunDir
from r1hpc.base.units import format_bytes, format_duration
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema import Precision, RunConfig
from r1hpc.plan.batch import BatchPlan
from r1hpc.plan.families import UnknownModelError
from r1hpc.plan.hardware import peak_flops
from r1hpc.plan.shape import flops_per_token, model_shape
from r1hpc.telemetry.metrics import MetricWriter
from r1hpc.telemetry.ranks import RankTimeWriter
from r1hpc.train.distributed import Group
from r1hpc.train.engine import (
    Parameters,
    accumulate,
    build_engine,
    check_precision,
    deepspeed_config,
    learning_rate,
    loss_scale,
    set_learning_rate,
)
from r1hpc.train.errors import NonFiniteError
from r1hpc.train.snapshot import Identity, Snapshots, seed_streams
from r1hpc.train.stop import StopRequests
from r1hpc.train.watchdog import Watchdog

_TIMES_EVERY = 10
"""Steps between two gatherings of the ranks' own times."""


@dataclass(frozen=True)
class Job:
    """What `attempt.rank` hands to a stage."""

    config: RunConfig
    run: RunDir
    group: Group
    attempt: int
    token: str
    node: str
    dataset_path: Path | None
    """None for the stages that read no shards."""
    requests: StopRequests
    watchdog: Watchdog


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: FINISHED, or STOPPED after a save because `reason` asked for it."""

    finished: bool
    global_step: int
    last_committed_step: int | None
    reason: str = ""
    kept: int = 0
    """Finished pieces of work beyond that step (groups of a rollout, held-out answers), on disk."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after they summed what each knew: the same everywhere."""

    loss: float
    """The mean over the ranks; nan where one of them has none that is finite."""
    stop: bool
    save: bool
    failed_ranks: int
    sums: tuple[float, ...] = ()
    """Whatever else was summed, in the order given."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. The same on every rank, but for forward_s."""

    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped: bool
    """fp16 overflowed, and DeepSpeed left the weights as they were."""
    stop: bool
    """Some rank was asked to stop; save, then leave."""
    save: bool
    sums: tuple[float, ...]
    """What the stage had summed over the ranks, in its order."""
    forward_s: float
    """In this rank's own forward passes."""


@dataclass(frozen=True)
class Plan:
    """What a stage hands to the loop before anything is built."""

    network: torch.nn.Module
    hf_config: dict[str, Any]
    batch: BatchPlan
    data_id: str
    """Names the data; a checkpoint of other data is refused."""
    order_id: str
    """Names the order in which it is read."""
    parameters: Parameters | None = None
    """Parameter groups with rates of their own; None: all parameters, one rate."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More that must be the same at resume, for example which reference the KL is taken to."""


class Stage(Protocol):
    """What pretraining, SFT and RL bring to the loop."""

    def begin(self, session: "Session") -> bool:
        """Before the first step of the attempt; False when a stop was requested before it was done."""

    def take_step(self, session: "Session", step: int) -> StepResult | None:
        """Take optimizer step `step` (from 1); None when a stop was requested before it was taken."""

    def meta(self, step: int) -> dict[str, Any]:
        """What the manifest of a checkpoint after `step` says of the data."""

    def write_state(self, folder: Path) -> None:
        """Put this rank's own files, named `stage_rank_<n>…`, into a checkpoint being written."""

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Take them back from a committed checkpoint, perhaps of another number of ranks."""

    def finish(self, session: "Session") -> bool:
        """After the last step is saved; False when a stop was requested before it was done."""

    def kept(self, step: int) -> int:
        """Finished pieces of work after `step` that the next attempt will find on disk."""


class RankTimes:
    """How long each rank worked and how long it waited, every few steps, for finding a straggler."""

    def __init__(self, job: Job) -> None:
        self._group = job.group
        self._times: list[tuple[float, float]] = []
        self._writer: RankTimeWriter | None = None
        places: list[tuple[str, str | None]] = job.group.gather((job.node, _gpu_uuid(job.group)))
        if job.group.rank == 0:
            nodes, uuids = zip(*places, strict=True)
            self._writer = RankTimeWriter(job.run, job.attempt, nodes, uuids)

    def step(self, global_step: int, step_time_s: float, own_s: float) -> None:
        """A step is over. Collective, every _TIMES_EVERY steps.

        Args:
            own_s: of that, in what this rank did by itself: reading, sampling, its forward passes.
        """
        self._times.append((step_time_s, max(0.0, step_time_s - own_s)))
        if len(self._times) < _TIMES_EVERY:
            return
        means = [sum(column) / len(self._times) for column in zip(*self._times, strict=True)]
        gathered = self._group.gather(means)
        if self._writer is not None:
            times, waits = zip(*gathered, strict=True)
            self._writer.write(
                global_step=global_step, num_steps=len(self._times), step_time_s=times, wait_s=waits
            )
        self._times = []


@dataclass
class Session:
    """Everything the loop touches, built once per attempt."""

    job: Job
    engine: Any
    snapshots: Snapshots
    metrics: MetricWriter
    batch: BatchPlan
    first_step: int
    hf_config: dict[str, Any]
    peak_flops: float | None
    rank_times: RankTimes
    skipped_in_a_row: int = 0


def set_up(job: Job, stage: Stage, plan: Plan) -> Session:
    """Choose the checkpoint, build the engine, load both the engine's state and the stage's."""
    config, group = job.config, job.group
    identity = Identity(
        dataset_id=plan.data_id,
        plan_hash=plan.order_id,
        global_batch_size=plan.batch.global_batch_size,
        model=hashlib.sha256(json.dumps(plan.hf_config, sort_keys=True).encode()).hexdigest()[:16],
        precision=config.train.precision.value,
        zero_stage=config.deepspeed.zero_stage,
        world_size=group.world_size,
        facts=plan.facts,
    )
    store = CheckpointStore(job.run.checkpoints, keep=config.checkpoint.keep)
    snapshots = Snapshots(store, group, job.attempt, job.token, identity, job.run.path)
    job.watchdog.beat("verifying checkpoints")
    checkpoint = snapshots.choose()
    job.watchdog.beat("building the engine")
    ds_config = deepspeed_config(
        config,
        plan.batch,
        world_size=group.world_size,
        on_gpu=group.device.type == "cuda",
        load_universal=snapshots.needs_conversion(checkpoint),
    )
    engine = build_engine(plan.network, ds_config, plan.parameters)
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
    return Session(
        job=job,
        engine=engine,
        snapshots=snapshots,
        metrics=metrics,
        batch=plan.batch,
        first_step=step + 1,
        hf_config=plan.hf_config,
        peak_flops=_peak_flops(group),
        rank_times=RankTimes(job),
    )


def train(session: Session, stage: Stage) -> Outcome:
    """Step until the last one or until a stop is requested; then what the stage does at its end."""
    job, snapshots = session.job, session.snapshots
    last_step = job.config.train.num_steps
    step = session.first_step - 1
    if not stage.begin(session):
        _save(session, stage, step, hurry=True)
        return _stopped(session, stage, step)
    stop = agree(session).stop
    while step < last_step and not stop:
        result = stage.take_step(session, step + 1)
        if result is None:
            _save(session, stage, step, hurry=True)
            stop = True
            break
        step, stop = step + 1, result.stop
        due = step % job.config.checkpoint.save_every == 0 or step == last_step
        if due or result.save or result.stop:
            _save(session, stage, step, hurry=result.stop)
    finished = step >= last_step and not stop and stage.finish(session)
    return Outcome(True, step, snapshots.last_committed_step) if finished else _stopped(session, stage, step)


def _stopped(session: Session, stage: Stage, step: int) -> Outcome:
    """The outcome of stopping after `step` because some rank was asked to."""
    reason = next(filter(None, session.job.group.gather(session.job.requests.reason)), "")
    return Outcome(False, step, session.snapshots.last_committed_step, reason, stage.kept(step))


def optimizer_step(
    session: Session,
    step: int,
    losses: Iterable[torch.Tensor],
    sums: Callable[[], Sequence[float]],
    *,
    num_losses: int = 1,
) -> StepResult:
    """Forward and backward for each micro batch, DeepSpeed's step, and the agreement of all ranks on it.

    Args:
        losses: made one by one as they are asked for: a generator that runs the forward passes.
        sums: gives what else to add up over the ranks; called when `losses` is used up.
        num_losses: the loss on record is the sum over the micro batches divided by this.

    Raises:
        NonFiniteError: see `_check_finite`.
    """
    engine, rate = session.engine, learning_rate(session.job.config.train, step)
    set_learning_rate(engine, rate)
    skipped_before = engine.skipped_steps
    total, norm, forward_s = accumulate(engine, losses)
    loss = total / num_losses
    skipped = engine.skipped_steps > skipped_before
    agreed = agree(session, loss, sums())
    _check_finite(session, step, agreed, loss, norm, skipped)
    return StepResult(agreed.loss, norm, rate, skipped, agreed.stop, agreed.save, agreed.sums, forward_s)


def agree(session: Session, loss: float = 0.0, sums: Sequence[float] = ()) -> Agreement:
    """Sum what every rank knows: the one collective of our own in a step.

    Args:
        loss: this rank's.
        sums: more numbers to add up over the ranks, equally many on each.
    """
    job, group = session.job, session.job.group
    stop, save = job.requests.poll()
    # Counted by a flag of its own: a sum that is nan would not say on how many ranks.
    bad = not math.isfinite(loss)
    mine = [0.0 if bad else loss, float(stop), float(save), float(bad), *sums]
    loss_sum, stops, saves, bads, *summed = group.all_sum(mine)
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
    # DeepSpeed answers an fp16 overflow by skipping the step and halving the loss scale: a few are normal.
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
    if not fp16_overflow and not norm <= train_.stop_grad_norm:  # `not <=` also catches nan
        raise NonFiniteError(
            f"step {step}: the gradient norm is {norm:g}, above train.stop_grad_norm="
            f"{train_.stop_grad_norm:g}: lower train.lr, or look at the data of this step"
        )


def _save(session: Session, stage: Stage, step: int, hurry: bool) -> None:
    """Commit the state after `step`, with the metrics and the ledger up to it durable first."""
    job, snapshots = session.job, session.snapshots
    if snapshots.last_committed_step == step:
        return
    job.watchdog.beat(f"saving step {step}")
    if job.group.rank == 0:
        for path in (job.run.train_metrics, ledger_path(job)):
            if path.exists():  # a run that stops before its first step has neither
                fsync_file(path)
    meta = {
        "global_step": step,
        "seed": job.config.train.seed,
        "num_nodes": job.config.resources.nodes,
        **stage.meta(step),
    }
    seconds = snapshots.save(session.engine, step, meta, hurry=hurry, write_more=stage.write_state)
    job.requests.saved()
    job.watchdog.beat(f"after saving step {step}")
    if job.group.rank == 0:
        session.metrics.event("save", global_step=step, seconds=seconds, bytes=snapshots.last_bytes)
        size = format_bytes(snapshots.last_bytes)
        print(f"saved step {step}: {size} in {format_duration(seconds)}", flush=True)


@dataclass(frozen=True)
class StepRecord:
    """What the stage adds to the result of a step for its record, on rank 0."""

    tokens: int
    """Trained so far, over all ranks and steps."""
    step_tokens: int
    step_time_s: float
    used: dict[str, Any]
    """Which samples, for the ledger."""
    data_time_s: float = 0.0
    flops: float | None = None
    """Model FLOPs of this step over all ranks; None where they are not known."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More for train.jsonl."""


def record(session: Session, step: int, result: StepResult, what: StepRecord) -> None:
    """The step's lines in metrics/train.jsonl and ledger/, and now and then one for a person."""
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
    """Forward and backward, for MFU; None for a family that cannot be counted."""
    try:
        return flops_per_token(model_shape(hf_config), seq_len)
    except UnknownModelError:
        return None


def _peak_flops(group: Group) -> float | None:
    if group.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(group.device))


def _gpu_uuid(group: Group) -> str | None:
    if group.device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(group.device).uuid}"


def _opening_line(job: Job, plan: Plan, step: int) -> str:
    group = job.group
    start = f"resuming after step {step}" if step else "starting"
    return (
        f"attempt {job.attempt}: {start} on {group.world_size} rank(s), {group.device.type}, "
        f"ZeRO {job.config.deepspeed.zero_stage}, {job.config.train.precision.value}, "
        f"accumulation {plan.batch.gradient_accumulation_steps}, data {plan.data_id[:24]}"
    )


def check_device(job: Job) -> None:
    """Refuse a precision the device lacks, before anything is built."""
    check_precision(job.config.train.precision)
