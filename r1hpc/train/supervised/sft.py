"""Fine-tune: next-token prediction on the completions of prompt and completion pairs.

Only tokens with the role of a completion have a loss: the mean over all completion tokens of the global
batch, so it does not depend on how rows are spread over ranks. With data.packing a row holds several
documents, each with positions from 0 and attention inside itself. Validation on held-out documents and early
stopping are here too; supervised.py has the step.

transformers finds the documents by their positions (masking_utils.find_packed_sequence_indices) and hides the
others: by a block mask if the attention takes a mask, as sdpa does, and by lengths for flash attention, then
with the micro batch in one row. `check_apart` refuses a model family that does not: one that carries a state
along the row, or builds its mask otherwise.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1hpc.attempt.workload import Outcome
from r1hpc.base.errors import ConfigError
from r1hpc.base.failpoints import failpoint
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.data.read.sft_documents import Parting, TraceDataset, hold_out, open_traces
from r1hpc.data.read.sft_loader import Rows, TraceBatch, TraceLoader
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.text.tokenizer import (
    TokenizerFiles,
    check_data_tokens,
    exported_tokenizer,
    load_tokenizer,
    special_ids,
    vocabulary_size,
)
from r1hpc.train.loop.session import Job, Session
from r1hpc.train.loop.step import agree
from r1hpc.train.model.attention import base_model
from r1hpc.train.model.sequence import SequenceGroup, share_sequences
from r1hpc.train.parallel.distributed import by_rank_0
from r1hpc.train.parallel.engine import check_precision
from r1hpc.train.supervised.supervised import Loader, Mixing, SupervisedStage, batch_plan, open_once

_LENGTH = 6
_MOST = 1e-2
"""Change of the logits allowed by another order of addition, relative to their spread."""


def run(job: Job) -> Outcome:
    """Train until the last step or until a stop is requested."""
    check_precision(job.config.train)
    config, group, batch = job.config, job.group, batch_plan(job)
    dataset_path = job.dataset_path
    assert dataset_path is not None, "begin sees to the dataset"
    tokenizer = load_tokenizer(config.model)
    dataset = open_once(group, lambda: open_traces(dataset_path, verify=config.data.verify))
    check_data_tokens(dataset.tokens.tokenizer_path, config.model)
    sequence = share_sequences(group, config.train.sequence_parallel)
    make = partial(
        TraceLoader,
        dataset,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=sequence.data_rank,
        world_size=sequence.data_world_size,
        seed=config.data.seed,
        pad_id=special_ids(tokenizer, config.model).pad,
        seq_len=config.data.seq_len,
        mix=config.data.mix,
        num_samples=config.train.num_steps * batch.global_batch_size,
        packing=config.data.packing,
    )
    parting = _held_out(job, dataset, lambda parting: Mixing(make(parting=parting), config).base_id)
    loader = make(parting=parting)
    rows = [] if parting is None else loader.rows_of(parting.held_out)
    hf_config = load_model_config(config, vocabulary_size(tokenizer))
    job.watchdog.beat("building the model")
    tokenizer_files = exported_tokenizer(config.model)
    return FineTuning(job, loader, sequence, tokenizer_files, rows).train(hf_config, batch)


class FineTuning(SupervisedStage[TraceBatch]):
    """The stage: the tokens of the completions have a loss."""

    def __init__(
        self,
        job: Job,
        loader: Loader[TraceBatch],
        sequence: SequenceGroup,
        tokenizer: TokenizerFiles,
        validation: Sequence[Rows] = (),
    ) -> None:
        """`validation`: this rank's micro batches of held-out documents; equally many on every rank."""
        super().__init__(job, loader, sequence, tokenizer)
        self._validation = validation
        self._lowest: float | None = None
        self._since = 0
        self._validated = 0

    def begin(self, session: Session) -> bool:
        """Also run the validation at which the last attempt was stopped; False if this one is stopped too."""
        if self._job.config.data.packing:
            check_apart(session.engine, self._job.config.model.attn_implementation)
        super().begin(session)
        step = session.first_step - 1
        if not step or not self._is_due(step) or self._validated >= step:
            return True
        loss = self._validate(session, step)
        if loss is not None and self._job.group.rank == 0:
            session.metrics.event("validation", global_step=step, validation_loss=loss)
        return loss is not None

    def losses(self, engine: Any, batch: TraceBatch) -> Iterator[torch.Tensor]:
        # DeepSpeed averages over the ranks; here their sum is the mean wanted.
        weight = self._job.group.world_size / batch.num_loss_tokens
        for rows in self.last_marked(engine, batch.micro_batches):
            yield self._loss(engine, rows) * weight

    def after_update(self, session: Session, step: int) -> tuple[dict[str, Any], bool]:
        if not self._is_due(step):
            return {}, False
        loss = self._validate(session, step)
        if loss is None:
            return {}, True
        return {"validation_loss": loss}, agree(session).stop

    def _is_due(self, step: int) -> bool:
        train = self._job.config.train
        return bool(self._validation) and (step % train.validate_every == 0 or step == train.num_steps)

    @property
    def is_done(self) -> bool:
        patience = self._job.config.train.early_stopping
        return patience > 0 and self._since >= patience

    def finish(self, session: Session) -> bool:
        """Export the model. With early stopping, the model of the lowest loss is exported already."""
        has_left_it = bool(self._job.config.train.early_stopping) and self._lowest is not None
        return has_left_it or super().finish(session)

    def _validate(self, session: Session, step: int) -> float | None:
        """Return the held-out loss after `step`; with early stopping a new lowest is exported. None: a stop
        was requested, and the next attempt begins with it."""
        loss = self._held_out_loss(session)
        if loss is None:
            return None
        self._validated = step
        if math.isfinite(loss) and (self._lowest is None or loss < self._lowest):
            self._lowest, self._since = loss, 0
            if self._job.config.train.early_stopping:
                self.export(session)
        else:
            self._since += 1
        return loss

    @torch.no_grad()
    def _held_out_loss(self, session: Session) -> float | None:
        """Return the mean over all completion tokens of held-out documents; None if a stop was requested."""
        total, num, stop = 0.0, 0, False
        session.engine.eval()
        for rows in self._validation:
            self._job.watchdog.beat("the loss on held-out documents")
            failpoint("validate.rows")
            total += float(self._loss(session.engine, rows))
            if self._sequence.index == 0:  # the others have the same documents
                num += int(rows.loss_mask.sum())
            stop = agree(session).stop
            if stop:
                break
        session.engine.train()
        summed, tokens = self._job.group.all_sum([total, num])
        return None if stop else summed / tokens

    def _loss(self, engine: Any, rows: Rows) -> torch.Tensor:
        """Return the sum over a micro batch's completion tokens, in this rank's part of its rows."""
        device, attention = self._job.group.device, self._job.config.model.attn_implementation
        part, padded = self._sequence.part, self._sequence.padded
        tokens = torch.from_numpy(padded(rows.tokens)).to(device)
        inputs, targets = part(tokens[:, :-1]), part(tokens[:, 1:])
        chosen = torch.from_numpy(np.flatnonzero(part(padded(rows.loss_mask)[:, 1:]))).to(device)
        if not self._job.config.data.packing:
            return self.cross_entropy(engine, inputs, targets, chosen)
        positions = torch.from_numpy(rows.positions).to(device)[:, :-1]
        inputs, targets, positions = map(packed_form(attention), (inputs, targets, positions))
        return self.cross_entropy(engine, inputs, targets, chosen, position_ids=positions)

    def counts(self, batch: TraceBatch) -> tuple[int, int, int]:
        return batch.num_loss_tokens, batch.num_positions, batch.attended

    def facts(self, batch: TraceBatch) -> dict[str, Any]:
        return {"useful_share": batch.num_tokens / batch.num_positions}

    def meta(self, step: int) -> dict[str, Any]:
        validation = [self._lowest, self._since, self._validated]
        # A batch's number of completion tokens does not follow from the step.
        return {**super().meta(step), "tokens": self._tokens, "validation": validation}

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        super().read_state(folder, meta)
        self._tokens = int(meta["tokens"])
        self._lowest, self._since, *step = meta.get("validation", (None, 0))  # older checkpoints lack it
        if self._lowest is not None and not math.isfinite(self._lowest):
            self._lowest = None  # a nan was once taken for the lowest
        self._validated = step[0] if step else meta["global_step"]  # which skipped none


def _held_out(job: Job, dataset: TraceDataset, order_id: Callable[[Parting], str]) -> Parting | None:
    """Choose the held-out documents; `order_id` returns the id of the order with them."""
    data = job.config.data
    if not data.validation_documents:
        return None
    job.watchdog.beat("choosing what is held out")

    def choose() -> Parting:
        stored = [each.manifest.meta for each in CheckpointStore(job.run.checkpoints).list()]
        return hold_out(
            dataset,
            data.validation_documents,
            data.seed,
            lambda parting: bool(stored) and order_id(parting) in [meta.get("plan_hash") for meta in stored],
        )

    parting = by_rank_0(job.group, choose)
    if job.group.rank == 0 and parting.siblings:
        num = len(parting.siblings)
        print(f"{num:,} traces are not trained on: they answer prompts of those held out", flush=True)
    return parting


def packed_form(attn_implementation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the layout of a micro batch's rows (rows, T): unchanged, or for flash attention all in one."""
    if attn_implementation.startswith("flash"):
        return lambda values: values.reshape(1, -1)
    return lambda values: values


@torch.no_grad()
def check_apart(engine: Any, attn_implementation: str) -> None:
    """Refuse a model that attends across documents packed into one row. Collective."""
    network = engine.module
    if "position_ids" not in inspect.signature(base_model(network).forward).parameters:
        raise _refused(network, attn_implementation)
    was_training = network.training
    engine.eval()
    positions, logits = torch.tensor([list(range(_LENGTH)) * 2], device=engine.device), []
    for token in (0, 1):  # the first document; the second one stays the same
        ids = torch.tensor([[token] * _LENGTH + [0, 1] * (_LENGTH // 2)], device=engine.device)
        logits.append(engine(input_ids=ids, position_ids=positions).logits[0, _LENGTH:].float())
    engine.train(was_training)
    one, other = logits
    if float((one - other).abs().max()) > _MOST * float(one.std()):
        raise _refused(network, attn_implementation)


def _refused(network: Any, attn_implementation: str) -> ConfigError:
    return ConfigError(
        f"data.packing: a {type(base_model(network)).__name__} with model.attn_implementation="
        f"{attn_implementation} does not keep the documents of a row apart: set data.packing=false"
    )
