"""Pretrain, and define the stage that pretraining and fine-tuning (sft.py) share.

A step's samples follow from its number, so a resumed run reads on where it was, on any number of ranks. If
the sources are mixed, a checkpoint holds every change of their weights that has begun, as a segment of the
order (data/read/mixture.py). Those are fixed; later ones can change.
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

from r1hpc.attempt.workload import Outcome
from r1hpc.base.failpoints import failpoint
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.data.read.loader import BatchLoader, StepBatch
from r1hpc.data.read.mixture import Change, Mixture
from r1hpc.data.read.open_plan import DocumentMixture, WindowMixture, open_plan
from r1hpc.data.read.reader import TokenDataset, open_dataset
from r1hpc.data.read.sft_documents import TraceDataset
from r1hpc.plan.model.shape import load_model_config
from r1hpc.plan.topology.batch import BatchPlan, solve_batch
from r1hpc.tasks.text.tokenizer import TokenizerFiles, check_data_tokens, exported_tokenizer
from r1hpc.train.loop import loop
from r1hpc.train.loop.session import Job, Plan, Session, Stage, StepRecord, StepResult
from r1hpc.train.loop.step import optimizer_step, record
from r1hpc.train.model.export import export_model
from r1hpc.train.model.output_head import OutputHead
from r1hpc.train.model.sequence import SequenceGroup, share_sequences
from r1hpc.train.parallel.distributed import Group, by_rank_0
from r1hpc.train.parallel.engine import check_precision
from r1hpc.train.parallel.errors import ResumeError
from r1hpc.train.rollout.policy import build_policy, placement


class Batch(Protocol):
    """One rank's data of one optimizer step."""

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]: ...
    @property
    def checksum(self) -> int: ...


BatchT = TypeVar("BatchT", bound=Batch)
BatchOf = TypeVar("BatchOf", bound=Batch, covariant=True)
DatasetT = TypeVar("DatasetT", TokenDataset, TraceDataset)


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
    """Open a dataset on rank 0 and return it on every rank; on each other node one rank checks its files. A
    dataset has thousands of files: a metadata server suffers when every rank asks for each of them."""
    found = by_rank_0(group, open_it)
    if group.local_rank == 0 and group.rank != 0:
        found.manifest.check_census()
    return found


class Loader(Protocol[BatchOf]):
    """Interface of a loader that gives a rank its batches by a plan."""

    dataset: Any
    plan: Any

    def batch(self, global_step: int) -> BatchOf: ...
    def order_id(self, plan: Any) -> str: ...


class Mixing:
    """The mixture of one run, the same on every rank. Without a mixture it does nothing."""

    def __init__(self, loader: Loader[Batch], config: RunConfig) -> None:
        self._loader = loader
        self._batch = config.train.global_batch_size
        is_mixed = isinstance(loader.plan, WindowMixture | DocumentMixture)
        self._mixture: Mixture | None = loader.plan.mixture if is_mixed else None

    @property
    def base_id(self) -> str:
        """Return the id of the order before any weight has changed."""
        return self._order_id(())

    def facts(self, step: int) -> dict[str, Any]:
        """Return the weight of each source in `step`, for train.jsonl."""
        return self._weights(step, "mix_") if self._changes else {}

    def announce(self, session: Session, step: int) -> None:
        """Record an event on rank 0 if other weights begin after `step`."""
        if not any(change.first_sample == step * self._batch for change in self._changes):
            return
        weights, order_id = self._weights(step + 1), self._order_id(self._drawn_from(step + 1))
        session.metrics.event("mix", global_step=step, from_step=step + 1, weights=weights, order_id=order_id)
        said = ", ".join(f"{name} {weight:.1%}" for name, weight in weights.items())
        print(f"from step {step + 1} on: {said}", flush=True)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the manifest entry of a checkpoint after `step`; empty if no weight has changed by then."""
        held = self._drawn_from(step)
        return {"mix": {"changes": _plain(held), "order_id": self._order_id(held)}} if held else {}

    def check(self, meta: dict[str, Any]) -> None:
        """Raise ResumeError if the changes of a checkpoint differ from the schedule before its step."""
        step, saved = int(meta["global_step"]), meta.get("mix", {"changes": [], "order_id": self.base_id})
        held = self._drawn_from(step)
        if saved["changes"] != _plain(held) or saved["order_id"] != self._order_id(held):
            changes = "; ".join(
                f"from step {first // self._batch + 1} on "
                + ", ".join(
                    f"{name} {weight:.4g}" for name, weight in zip(self._names, weights, strict=False)
                )
                for first, weights in saved["changes"]
            )
            raise ResumeError(
                f"the checkpoint was trained up to step {step} with {changes or 'no change of weights'}, and "
                f"data.mix.schedule says otherwise: only what begins at from_step {step + 1} or later can be "
                "changed"
            )

    @property
    def _changes(self) -> tuple[Change, ...]:
        return self._mixture.changes if self._mixture is not None else ()

    @property
    def _names(self) -> tuple[str, ...]:
        return self._mixture.names if self._mixture is not None else ()

    def _weights(self, step: int, prefix: str = "") -> dict[str, float]:
        assert self._mixture is not None, "only a mixture has weights"
        weights = self._mixture.weights_of(step - 1)
        return {f"{prefix}{name}": weight for name, weight in zip(self._names, weights, strict=True)}

    def _drawn_from(self, step: int) -> list[Change]:
        """Return the changes that `step` or an earlier one was drawn from."""
        return [change for change in self._changes if change.first_sample < step * self._batch]

    def _order_id(self, changes: Sequence[Change]) -> str:
        plan = self._loader.plan
        return self._loader.order_id(plan if self._mixture is None else plan.with_changes(changes))


def _plain(changes: Sequence[Change]) -> list[Any]:
    return [[change.first_sample, list(change.weights)] for change in changes]


class SupervisedStage(Stage, ABC, Generic[BatchT]):
    """The stage. Its state: the step, and the tokens trained on so far. It writes none of its own: the order
    of the data is a function of the step."""

    def __init__(
        self, job: Job, loader: Loader[BatchT], sequence: SequenceGroup, tokenizer: TokenizerFiles
    ) -> None:
        """
        Args:
            loader: gives `sequence`'s ranks their part of each global batch.
            tokenizer: goes into the export.
        """
        self._job = job
        self._loader = loader
        self._mixing = Mixing(loader, job.config)
        self._sequence = sequence
        self._tokenizer = tokenizer
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
        """Return the sum over the targets (rows, T) at flat positions `chosen`, or all. The model gets
        `more`. If ranks share a sequence, all of it concerns this rank's part."""
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
    def counts(self, batch: BatchT) -> tuple[int, int, int]:
        """Return how many tokens of the global batch have a loss, and for MFU how many positions are computed
        and how many each of them attends to."""

    def facts(self, batch: BatchT) -> dict[str, Any]:
        """Return more fields for train.jsonl."""
        return {}

    def after_update(self, session: Session, step: int) -> tuple[dict[str, Any], bool]:
        """Run what is due after step `step`; return more for train.jsonl, and whether to stop."""
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
        batch = self._loader.batch(step - 1)
        data_time_s = time.monotonic() - started
        job.watchdog.beat(f"step {step}")
        failpoint("step.begin")
        # Summed over the ranks these identify the global batch, whatever the number of ranks.
        proof = [float(v) for v in (batch.sample_ids.size, batch.sample_ids.sum(), batch.checksum)]
        if self._sequence.index:  # the first rank that shares them reports its samples
            proof = [0.0] * len(proof)
        losses = self.losses(session.engine, batch)
        result = optimizer_step(session, step, losses, lambda: proof)
        num_tokens, num_positions, attended = self.counts(batch)
        self._tokens += num_tokens
        step_time_s = time.monotonic() - started
        more: dict[str, Any] = {}
        if not result.stop:
            more, stop = self.after_update(session, step)
            result = replace(result, stop=stop)
        session.rank_times.step(step, step_time_s, data_time_s + result.forward_s)
        if job.group.rank == 0:
            per_token = loop.model_flops_per_token(session.hf_config, attended)
            done = StepRecord(
                tokens=self._tokens,
                step_tokens=num_tokens,
                step_time_s=step_time_s,
                used={
                    "first_sample": (step - 1) * job.config.train.global_batch_size,
                    "num_samples": int(result.sums[0]),
                    "sample_sum": int(result.sums[1]),
                    "checksum": int(result.sums[2]),
                },
                data_time_s=data_time_s,
                flops=None if per_token is None else per_token * num_positions,
                extra=self.facts(batch) | self._mixing.facts(step) | more,
            )
            record(session, step, result, done)
            self._mixing.announce(session, step)
        return result

    def meta(self, step: int) -> dict[str, Any]:
        return {"next_sample": step * self._job.config.train.global_batch_size, **self._mixing.meta(step)}

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        """Check the mixture; a stage adds its count of tokens. The loader needs only the step."""
        self._mixing.check(meta)

    def train(self, hf_config: dict[str, Any], batch: BatchPlan) -> Outcome:
        """Build the model, and train until the last step or until a stop is requested."""
        job, config = self._job, self._job.config
        plan = Plan(
            network=build_policy(config, hf_config, placement(config, job.group, divided=True)),
            hf_config=hf_config,
            batch=batch,
            data_id=self._loader.dataset.id,
            order_id=self._mixing.base_id,
        )
        return loop.train(loop.set_up(job, self, plan), self)

    def finish(self, session: Session) -> bool:
        """Export the model as a Hugging Face folder, for the stages that follow."""
        self.export(session)
        return True

    def export(self, session: Session) -> None:
        job = self._job
        job.watchdog.beat("exporting the model")
        export_model(session.engine.module, job.group, job.run.model, self._tokenizer)


def pretrain(job: Job) -> Outcome:
    """Pretrain on windows of sharded text until the last step or until a stop is requested."""
    check_precision(job.config.train)
    config, group, batch = job.config, job.group, batch_plan(job)
    dataset_path = job.dataset_path
    assert dataset_path is not None, "begin sees to the dataset"
    dataset = open_once(group, lambda: open_dataset(dataset_path, verify=config.data.verify))
    order = open_plan(
        dataset,
        config.data.seq_len,
        config.data.seed,
        batch.global_batch_size,
        num_samples=config.train.num_steps * batch.global_batch_size,
        mix=config.data.mix,
    )
    has_weights = config.model.path is not None and not config.model.from_scratch
    if has_weights and Path(str(config.model.path), "tokenizer.json").is_file():
        check_data_tokens(dataset.tokenizer_path, replace(config.model, tokenizer=None))
    hf_config = load_model_config(config, dataset.vocab_size)
    job.watchdog.beat("building the model")
    sequence = share_sequences(group, config.train.sequence_parallel)
    loader = BatchLoader(
        dataset,
        order,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=sequence.data_rank,
        world_size=sequence.data_world_size,
    )
    return Pretraining(job, loader, sequence, tokenizer_of_data(dataset)).train(hf_config, batch)


class Pretraining(SupervisedStage[StepBatch]):
    """The stage: every position of every window has a loss."""

    def losses(self, engine: Any, batch: StepBatch) -> Iterator[torch.Tensor]:
        part = self._sequence.part
        micro_batches = torch.from_numpy(batch.tokens).to(self._job.group.device)
        # Every rank has equally many, so the mean over the ranks is the mean over all targets.
        num_targets = part(micro_batches[..., 1:]).numel()
        for micro_batch in self.last_marked(engine, micro_batches):
            inputs, targets = part(micro_batch[:, :-1]), part(micro_batch[:, 1:])
            yield self.cross_entropy(engine, inputs, targets) / num_targets

    def counts(self, batch: StepBatch) -> tuple[int, int, int]:
        seq_len = self._job.config.data.seq_len
        num_tokens = self._job.config.train.global_batch_size * seq_len
        return num_tokens, num_tokens, seq_len

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        super().read_state(folder, meta)
        self._tokens = int(meta["next_sample"]) * self._job.config.data.seq_len


def tokenizer_of_data(dataset: TokenDataset) -> TokenizerFiles:
    """Return a dataset's tokenizer and end-of-document id; for a dataset of ids, the id alone."""
    folder, end = dataset.tokenizer_path, dataset.eos_id
    if folder is None:
        return TokenizerFiles({}, (end,))
    return exported_tokenizer(ModelConfig(tokenizer=str(folder)), end)
