"""Define what a stage and the loop exchange: job, plan, session, and the result of a step.

A stage brings the network, the data and a step's losses (Plan, Stage); loop.set_up makes a Session.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from r1hpc.attempt.control.stop import StopRequests
from r1hpc.attempt.control.watchdog import Watchdog
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import BatchPlan
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.parallel.compression import GradientExchange
from r1hpc.train.parallel.distributed import Group, RankTimes
from r1hpc.train.parallel.engine import Parameters


@dataclass(frozen=True)
class Job:
    config: RunConfig
    run: RunDir
    group: Group
    attempt: int
    token: str
    node: str
    dataset_path: Path | None
    """None for stages that read no shards."""
    requests: StopRequests
    watchdog: Watchdog

    def stop_reason(self) -> str:
        """Return why a rank was asked to stop, the same on every rank; empty if none was. Collective."""
        return next(filter(None, self.group.gather(self.requests.reason)), "")


@dataclass(frozen=True)
class Agreement:
    """The sums of what all ranks know, the same on every rank."""

    loss: float
    """Mean over the ranks; nan if one of them has no finite loss."""
    stop: bool
    save: bool
    failed_ranks: int
    sums: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on every rank except forward_s."""

    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped: bool
    """True if fp16 overflowed and DeepSpeed left the weights unchanged."""
    stop: bool
    """Some rank was asked to stop; save, then leave."""
    save: bool
    sums: tuple[float, ...]
    """The stage's sums over the ranks, in its order."""
    forward_s: float
    """Seconds in this rank's own forward passes."""


@dataclass(frozen=True)
class StepRecord:
    """The stage's part of a step's record, on rank 0."""

    tokens: int
    """Tokens trained so far, over all ranks and steps."""
    step_tokens: int
    step_time_s: float
    used: dict[str, Any]
    data_time_s: float = 0.0
    flops: float | None = None
    """Model FLOPs of this step over all ranks; None if unknown."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A stage's input to the loop, before anything is built."""

    network: torch.nn.Module
    hf_config: dict[str, Any]
    batch: BatchPlan
    data_id: str
    """Id of the data; a checkpoint of other data is refused."""
    order_id: str
    parameters: Parameters | None = None
    """Parameter groups with their own rates; None: all parameters, one rate."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More facts that must match at resume, such as the reference of the KL."""


@dataclass
class Session:
    """Everything the loop uses, built once per attempt."""

    job: Job
    engine: Any
    snapshots: Snapshots
    metrics: MetricWriter
    first_step: int
    hf_config: dict[str, Any]
    peak_flops: float | None
    rank_times: RankTimes
    exchange: GradientExchange | None = None
    """The exchange of gradients; None under ZeRO, where bytes are not counted."""
    skipped_in_a_row: int = 0


class Stage(Protocol):
    """Interface of pretraining, SFT and RL to the loop. A stage that inherits it overrides what it needs."""

    def begin(self, session: Session) -> bool:
        """Run before the attempt's first step; False if a stop was requested before it was done."""
        return True

    def take_step(self, session: Session, step: int) -> StepResult | None:
        """Take optimizer step `step` (from 1); None if a stop was requested before it."""

    def meta(self, step: int) -> dict[str, Any]:
        """Return the facts about the data for the manifest of a checkpoint after `step`."""

    def state_writer(self) -> Callable[[Path], None]:
        """Return a function that writes this rank's current files, `stage_rank_<n>…`, into a checkpoint.
        Another thread calls it later, while training goes on."""
        return lambda folder: None

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Load them from a committed checkpoint, perhaps of another number of ranks."""

    @property
    def is_done(self) -> bool:
        """True if the run is over before its last step; the same on every rank."""
        return False

    def finish(self, session: Session) -> bool:
        """Run after the last step is saved; False if a stop was requested before it was done."""

    def kept(self, step: int) -> int:
        """Return how many finished pieces of work after `step` the next attempt will find on disk."""
        return 0
