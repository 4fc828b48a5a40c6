"""Run an optimizer step on a fixed batch of tokens, for pretraining and fine-tuning.

    class Pretraining(SupervisedStage[StepBatch]): ...   # defines its losses and how many tokens count

A step's samples follow from its number, so a resumed run reads on where it was, on any number of ranks.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.base.failpoints import failpoint
from r1hpc.data.format.manifest import DatasetManifest
from r1hpc.plan.topology.batch import BatchPlan, solve_batch
from r1hpc.tasks.text.tokenizer import TokenizerFiles
from r1hpc.train.loop import loop, step_records
from r1hpc.train.loop.session import Job, Session, StepResult
from r1hpc.train.losses.logits import OutputHead
from r1hpc.train.model.export import export_model
from r1hpc.train.model.sequence import SequenceGroup
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.supervised.mixing import Mixing


class Batch(Protocol):
    """One rank's data of one optimizer step."""

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]: ...
    @property
    def checksum(self) -> int: ...


class OnFiles(Protocol):
    """An open dataset."""

    manifest: DatasetManifest


BatchT = TypeVar("BatchT", bound=Batch)
DatasetT = TypeVar("DatasetT", bound=OnFiles)
MadeT = TypeVar("MadeT")


def batch_plan(job: Job) -> BatchPlan:
    """Return how the global batch is divided over the ranks of this attempt."""
    train = job.config.train
    return solve_batch(
        train.global_batch_size,
        train.micro_batch_size,
        job.group.world_size,
        train.gradient_accumulation_steps,
        sequence_parallel=train.sequence_parallel,
    )


def open_once(group: Group, open_it: Callable[[], DatasetT]) -> DatasetT:
    """Open a dataset on rank 0 and return it on every rank; on each other node one rank checks its files.

    A dataset has thousands of files: a metadata server suffers when every rank asks for each of them.

    Raises:
        R1hpcError: rank 0's error, on every rank; or a file that this node does not see.
    """
    found = by_rank_0(group, open_it)
    if group.local_rank == 0 and group.rank != 0:
        found.manifest.check_census()
    return found


def by_rank_0(group: Group, make: Callable[[], MadeT]) -> MadeT:
    """Return on every rank what rank 0 makes.

    Raises:
        R1hpcError: rank 0's error, on every rank.
    """
    found: MadeT | R1hpcError | None = None
    if group.rank == 0:
        try:
            found = make()
        except R1hpcError as error:
            found = error
    made: MadeT | R1hpcError = group.broadcast(found)
    if isinstance(made, R1hpcError):
        raise made
    return made


class SupervisedStage(ABC, Generic[BatchT]):
    """The stage. Its state: the step, and the tokens trained on so far."""

    def __init__(
        self, job: Job, batch_of: Callable[[int], BatchT], mixing: Mixing, sequence: SequenceGroup
    ) -> None:
        """`batch_of` returns the part of a step's global batch for `sequence`'s ranks, counted from 0."""
        self._job = job
        self._batch_of = batch_of
        self._mixing = mixing
        self._sequence = sequence
        self._tokens = 0
        self._head: OutputHead | None = None

    def cross_entropy(
        self,
        engine: Any,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        chosen: torch.Tensor | None = None,
        **more: torch.Tensor,
    ) -> torch.Tensor:
        """Return the sum over the targets (rows, T) at flat positions `chosen`, or all; the model gets
        `more`.

        If ranks share a sequence, all of it concerns this rank's part.
        """
        if self._sequence.size > 1:
            more = {**more, "position_ids": self._sequence.positions(inputs)}
        if self._head is None:
            self._head = OutputHead(engine.module, self._job.config.train.logits_chunk_tokens)
        scores = self._head.scores(lambda: engine(input_ids=inputs, **more).logits, targets, chosen)
        return -scores.logprobs.sum()

    def last_marked(self, engine: Any, micro_batches: Sequence[Any] | torch.Tensor) -> Iterator[Any]:
        """Yield each micro batch; the engine learns at which one the gradients are complete."""
        for number, micro_batch in enumerate(micro_batches):
            engine.set_gradient_accumulation_boundary(number + 1 == len(micro_batches))
            yield micro_batch

    @abstractmethod
    def losses(self, engine: Any, batch: BatchT) -> Iterator[torch.Tensor]:
        """Yield the loss of each micro batch; training uses the mean over the ranks of their sum."""

    @abstractmethod
    def num_tokens(self, batch: BatchT) -> int:
        """Return how many tokens of the global batch have a loss."""

    @abstractmethod
    def computed(self, batch: BatchT) -> tuple[int, int]:
        """Return the computed positions of the global batch, and how many each attends to; for MFU."""

    def facts(self, batch: BatchT) -> dict[str, Any]:
        """Return more fields for train.jsonl."""
        return {}

    def after_update(self, session: Session, step: int) -> tuple[dict[str, Any], bool]:
        """Run what is due after step `step`, on all ranks, if no stop was requested.

        Returns:
            More for train.jsonl; whether a stop was requested meanwhile.
        """
        return {}, False

    def begin(self, session: Session) -> bool:
        self._sequence.attend(session.engine, self._job.config.model.attn_implementation)
        if self._job.group.rank == 0:
            self._mixing.announce(session, session.first_step - 1)
        return True

    def take_step(self, session: Session, step: int) -> StepResult:
        """Take one optimizer step on its samples: [(step - 1) x global_batch_size, step x ...)."""
        job, started = self._job, time.monotonic()
        job.watchdog.beat(f"reading data of step {step}")
        batch = self._batch_of(step - 1)
        data_time_s = time.monotonic() - started
        job.watchdog.beat(f"step {step}")
        failpoint("step.begin")
        # Summed over the ranks these identify the global batch, whatever the number of ranks.
        proof = [float(v) for v in (batch.sample_ids.size, batch.sample_ids.sum(), batch.checksum)]
        if self._sequence.index:  # the first rank that shares them reports its samples
            proof = [0.0] * len(proof)
        losses = self.losses(session.engine, batch)
        result = loop.optimizer_step(session, step, losses, lambda: proof)
        num_tokens = self.num_tokens(batch)
        self._tokens += num_tokens
        step_time_s = time.monotonic() - started
        more: dict[str, Any] = {}
        if not result.stop:
            more, stop = self.after_update(session, step)
            result = replace(result, stop=stop)
        session.rank_times.step(step, step_time_s, data_time_s + result.forward_s)
        if job.group.rank == 0:
            done = step_records.StepRecord(
                tokens=self._tokens,
                step_tokens=num_tokens,
                step_time_s=step_time_s,
                used=self._used(step, result),
                data_time_s=data_time_s,
                flops=_flops(session, *self.computed(batch)),
                extra=self.facts(batch) | self._mixing.facts(step) | more,
            )
            step_records.record(session, step, result, done)
            self._mixing.announce(session, step)
        return result

    def meta(self, step: int) -> dict[str, Any]:
        return {"next_sample": step * self._job.config.train.global_batch_size, **self._mixing.meta(step)}

    def state_writer(self) -> Callable[[Path], None]:
        """Write nothing: the order of the data is a function of the step."""
        return lambda folder: None

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Load the count of tokens: the loader needs only the step."""
        self._mixing.check(meta)
        self._tokens = self.tokens_in(meta)

    @abstractmethod
    def tokens_in(self, meta: dict[str, Any]) -> int:
        """Return the tokens trained on until a checkpoint."""

    @abstractmethod
    def tokenizer_files(self) -> TokenizerFiles | None:
        """Return the tokenizer for the export; None if the data are ids of an unknown one."""

    @property
    def is_done(self) -> bool:
        return False

    def finish(self, session: Session) -> bool:
        """Export the model as a Hugging Face folder, for the stages that follow."""
        self.export(session)
        return True

    def export(self, session: Session) -> None:
        job = self._job
        job.watchdog.beat("exporting the model")
        export_model(session.engine.module, job.group, job.run.model, self.tokenizer_files())

    def kept(self, step: int) -> int:
        return 0

    def _used(self, step: int, result: StepResult) -> dict[str, Any]:
        num_samples, sample_sum, checksum = map(int, result.sums[:3])
        return {
            "first_sample": (step - 1) * self._job.config.train.global_batch_size,
            "num_samples": num_samples,
            "sample_sum": sample_sum,
            "checksum": checksum,
        }


def _flops(session: Session, num_positions: int, attended: int) -> float | None:
    """Return the model FLOPs of a global batch; None if unknown for the model."""
    per_token = step_records.model_flops_per_token(session.hf_config, attended)
    return None if per_token is None else per_token * num_positions
