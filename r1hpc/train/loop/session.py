"""What a stage and the loop hand each other: job, plan, session, the result of a step.

A stage brings the network, the data and the losses of a step (Plan, Stage); loop.set_up makes a Session.
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
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import Parameters
from r1hpc.train.parallel.rank_times import RankTimes


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
    exchange: GradientExchange | None = None
    """Of gradients; None under ZeRO, where nobody counts its bytes."""
    skipped_in_a_row: int = 0


class Stage(Protocol):
    """What pretraining, SFT and RL bring to the loop."""

    def begin(self, session: Session) -> bool:
        """Before the first step of the attempt; False when a stop was requested before it was done."""

    def take_step(self, session: Session, step: int) -> StepResult | None:
        """Take optimizer step `step` (from 1); None when a stop was requested before it was taken."""

    def meta(self, step: int) -> dict[str, Any]:
        """What the manifest of a checkpoint after `step` says of the data."""

    def state_writer(self) -> Callable[[Path], None]:
        """What puts this rank's own files, named `stage_rank_<n>…`, as of now, into a checkpoint's folder.

        Called later, by another thread, while training goes on.
        """

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Take them back from a committed checkpoint, perhaps of another number of ranks."""

    @property
    def is_done(self) -> bool:
        """Whether the run is over before its last step; the same on every rank."""

    def finish(self, session: Session) -> bool:
        """After the last step is saved; False when a stop was requested before it was done."""

    def kept(self, step: int) -> int:
        """Finished pieces of work after `step` that the next attempt will find on disk."""
