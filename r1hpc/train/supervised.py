"""An optimizer step on a fixed batch of tokens: what pretraining and fine-tuning share.

    class Pretraining(SupervisedStage[StepBatch]): ...   # says what its losses are and how many tokens count

The samples of a step follow from its number, so a resumed run reads on where it was, on any number of ranks.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.base.failpoints import failpoint
from r1hpc.plan.batch import BatchPlan, solve_batch
from r1hpc.train import loop
from r1hpc.train.loop import Job, Session, StepResult


class Batch(Protocol):
    """What one rank consumes in one optimizer step; (gradient_accumulation_steps, micro_batch_size, ...)."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]: ...
    @property
    def sample_ids(self) -> npt.NDArray[np.int64]: ...
    @property
    def checksum(self) -> int: ...


BatchT = TypeVar("BatchT", bound=Batch)


def batch_plan(job: Job) -> BatchPlan:
    """How the global batch is cut over the ranks of this attempt."""
    train = job.config.train
    return solve_batch(
        train.global_batch_size,
        train.micro_batch_size,
        job.group.world_size,
        train.gradient_accumulation_steps,
    )


class SupervisedStage(ABC, Generic[BatchT]):
    """The stage. State: the step, and the tokens trained on so far."""

    def __init__(self, job: Job, batch_of: Callable[[int], BatchT]) -> None:
        """`batch_of` gives this rank's part of the global batch of a step, counted from 0."""
        self._job = job
        self._batch_of = batch_of
        self._tokens = 0

    @abstractmethod
    def losses(self, engine: Any, batch: BatchT) -> Iterator[torch.Tensor]:
        """The loss of each micro batch; the mean over them and over the ranks is what is trained on."""

    @abstractmethod
    def num_tokens(self, batch: BatchT) -> int:
        """How many tokens of the global batch have a loss."""

    @abstractmethod
    def seq_len(self, batch: BatchT) -> int:
        """Positions of a row that are computed, for MFU."""

    def begin(self, session: Session) -> bool:
        return True

    def take_step(self, session: Session, step: int) -> StepResult:
        """One optimizer step on the samples of `step`: [(step - 1) x global_batch_size, step x ...)."""
        job, started = self._job, time.monotonic()
        job.watchdog.beat(f"reading data of step {step}")
        batch = self._batch_of(step - 1)
        data_time_s = time.monotonic() - started
        job.watchdog.beat(f"step {step}")
        failpoint("step.begin")
        # Summed over the ranks these name the global batch, whatever the number of ranks.
        proof = [float(v) for v in (batch.sample_ids.size, batch.sample_ids.sum(), batch.checksum)]
        result = loop.optimizer_step(
            session, step, self.losses(session.engine, batch), lambda: proof, num_losses=len(batch.tokens)
        )
        num_tokens = self.num_tokens(batch)
        self._tokens += num_tokens
        step_time_s = time.monotonic() - started
        session.rank_times.step(step, step_time_s, data_time_s + result.forward_s)
        if job.group.rank == 0:
            done = loop.StepRecord(
                tokens=self._tokens,
                step_tokens=num_tokens,
                step_time_s=step_time_s,
                used=self._used(step, result),
                data_time_s=data_time_s,
                flops=_flops(session, self.seq_len(batch)),
            )
            loop.record(session, step, result, done)
        return result

    def meta(self, step: int) -> dict[str, Any]:
        return {"next_sample": step * self._job.config.train.global_batch_size}

    def write_state(self, folder: Path) -> None:
        """Nothing: the order of the data is a function of the step."""

    @abstractmethod
    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Only the count of tokens: the loader is asked by step."""

    def finish(self, session: Session) -> bool:
        return True

    def kept(self, step: int) -> int:
        return 0

    def _used(self, step: int, result: StepResult) -> dict[str, Any]:
        num_samples, sample_sum, checksum = map(int, result.sums)
        return {
            "first_sample": (step - 1) * self._job.config.train.global_batch_size,
            "num_samples": num_samples,
            "sample_sum": sample_sum,
            "checksum": checksum,
        }


def _flops(session: Session, seq_len: int) -> float | None:
    """Model FLOPs of a global batch whose rows have `seq_len` positions; None: not known for the model."""
    per_token = loop.model_flops_per_token(session.hf_config, seq_len)
    return None if per_token is None else per_token * (session.batch.global_batch_size * seq_len)
