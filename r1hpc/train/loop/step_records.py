"""Write rank 0's records of a step: metrics/train.jsonl, ledger/, the log.

record(session, step, result, StepRecord(tokens=...))
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1hpc.base.files import append_record
from r1hpc.base.units import format_duration
from r1hpc.plan.model.families import UnknownModelError
from r1hpc.plan.model.shape import flops_per_token, model_shape
from r1hpc.train.loop.session import Job, Session, StepResult
from r1hpc.train.parallel.engine import loss_scale


@dataclass(frozen=True)
class StepRecord:
    """The stage's part of a step's record, on rank 0."""

    tokens: int
    """Tokens trained so far, over all ranks and steps."""
    step_tokens: int
    step_time_s: float
    used: dict[str, Any]
    """The samples used, for the ledger."""
    data_time_s: float = 0.0
    flops: float | None = None
    """Model FLOPs of this step over all ranks; None if unknown."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields for train.jsonl."""


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
