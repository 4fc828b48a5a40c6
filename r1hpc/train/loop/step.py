"""Take one optimizer step on the losses of a stage, agree with all ranks on it, and record it.

    result = optimizer_step(session, step, losses, sums)     # rate, forward, backward, DeepSpeed's step
    record(session, step, result, what)                      # on rank 0

Everything is decided from one sum over the ranks (`agree`), so all ranks decide alike.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from r1hpc.base.units import format_bytes, format_duration
from r1hpc.config.schema.run import Precision, TrainConfig
from r1hpc.train.loop.session import Agreement, Session, StepRecord, StepResult
from r1hpc.train.parallel.errors import NonFiniteError, TrainError


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


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the rate of step `step` (from 1): linear warm-up, then cosine to lr x min_lr_fraction."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    span = max(1, train.num_steps - train.warmup_steps)
    progress = min(1.0, (step - train.warmup_steps) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr * (train.min_lr_fraction + (1 - train.min_lr_fraction) * cosine)


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class Accumulated(NamedTuple):
    """One optimizer step on this rank."""

    loss: float
    grad_norm: float
    """Over all ranks, before clipping."""
    forward_s: float
    """Seconds in this rank's own forward passes, which wait for no other rank (except for weights under ZeRO
    3, and for ranks that share its sequences)."""


def accumulate(engine: Any, losses: Iterable[torch.Tensor]) -> Accumulated:
    """Run backward for each loss that the generator makes and, at the boundary, the optimizer step."""
    total, norm = torch.zeros((), device=engine.device), None
    watch = _Stopwatch(on_gpu=engine.device.type == "cuda")
    for loss in watch.timed(losses):
        with _deterministic():
            engine.backward(loss)
        if not hasattr(engine.optimizer, "_global_grad_norm") and engine.is_gradient_accumulation_boundary():
            # fp32 under ZeRO 0: DeepSpeed clips torch's own optimizer and keeps no norm. Here the gradients
            # in the module are averaged over the ranks.
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
        total += loss.detach()
    # float() waits for the GPU, so the stopwatch's events are over when they are read.
    return Accumulated(float(total), grad_norm(engine) if norm is None else norm, watch.seconds())


def _alive(session: Session, step: int, losses: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Beat the watchdog with each loss: an update of long completions may outlast the hang timeout."""
    for loss in losses:
        session.job.watchdog.beat(f"update of step {step}")
        yield loss


@contextmanager
def _deterministic() -> Iterator[None]:
    """Make a backward pass under train.deterministic fail if an operation has no deterministic kernel.

    Fused attention has one, but torch takes it only if anything else is an error, not a warning
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainError(f"{str(error).splitlines()[0]} Take train.deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


class _Stopwatch:
    """Measures the time to make the items of an iterable; on a GPU by events, without waiting for it."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[tuple[Any, Any]] = []

    def timed(self, items: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        iterator = iter(items)
        while True:
            start = self._now()
            item = next(iterator, None)
            if item is None:
                return
            self._marks.append((start, self._now()))
            yield item

    def seconds(self) -> float:
        if self._on_gpu:
            return float(sum(start.elapsed_time(end) for start, end in self._marks)) / 1000
        return float(sum(end - start for start, end in self._marks))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def grad_norm(engine: Any) -> float:
    """Return the global gradient norm of the last step, before clipping; nan if fp16 overflowed."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return math.nan
    return float(norm.item() if isinstance(norm, torch.Tensor) else norm)


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
        finish_save(session)
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
    session.metrics.used(global_step=step, **what.used)
    if step % train_.print_every == 0 or step in (session.first_step, train_.num_steps):
        left = format_duration((train_.num_steps - step) * what.step_time_s)
        line = f"step {step}/{train_.num_steps}  loss {result.loss:.4f}  grad {result.grad_norm:.3f}"
        line += f"  lr {result.lr:.2e}"
        if "reward" in what.extra:
            line += f"  reward {what.extra['reward']:.3f}  accuracy {what.extra['accuracy']:.3f}"
        line += f"  {tokens_per_second:,.0f} tok/s" + (f"  MFU {mfu:.1%}" if mfu else "")
        print(f"{line}  {left} left", flush=True)


def loss_scale(engine: Any, precision: Precision) -> float | None:
    """Return fp16's current loss scale; None for other precisions."""
    return float(engine.optimizer.loss_scale) if precision is Precision.fp16 else None


def finish_save(session: Session, *, hurry: bool = False) -> None:
    """Wait for the save under way, if any, and record it."""
    job, step = session.job, session.snapshots.step_being_written
    if step is None:
        return
    job.watchdog.beat(f"writing the checkpoint of step {step}")
    saved = session.snapshots.finish(hurry=hurry)
    job.watchdog.beat(f"after saving step {step}")
    if saved is None:
        return
    job.requests.committed()
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
