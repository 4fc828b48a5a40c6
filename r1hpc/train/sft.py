"""Supervised fine-tuning: next-token prediction on the completions of prompt and completion pairs.

    outcome = run(job)      # on every rank

The roles stored in the shards say which tokens are a completion; only those have a loss. It is the mean over
all completion tokens of the global batch, so it does not depend on how rows were spread over ranks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from r1hpc.data.trace_loader import TraceBatch, TraceLoader
from r1hpc.data.traces import open_traces
from r1hpc.plan.model import load_model_config
from r1hpc.tasks.tokenizer import load_tokenizer, special_ids
from r1hpc.train import loop
from r1hpc.train.export import export_model
from r1hpc.train.loop import Job, Outcome, Session
from r1hpc.train.policy import build_policy
from r1hpc.train.supervised import SupervisedStage, batch_plan


def run(job: Job) -> Outcome:
    """Train until the last step or until a stop is requested."""
    loop.check_device(job)
    config, group, batch = job.config, job.group, batch_plan(job)
    assert job.dataset_path is not None, "begin sees to the dataset"
    tokenizer = load_tokenizer(config.model)
    dataset = open_traces(job.dataset_path, verify=config.data.verify)
    loader = TraceLoader(
        dataset,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=group.rank,
        world_size=group.world_size,
        seed=config.data.seed,
        pad_id=special_ids(tokenizer, config.model).pad,
        seq_len=config.data.seq_len,
    )
    hf_config = load_model_config(config, tokenizer.get_vocab_size())
    job.watchdog.beat("building the model")
    stage = FineTuning(job, loader.batch)
    plan = loop.Plan(
        network=build_policy(config, hf_config),
        hf_config=hf_config,
        batch=batch,
        data_id=dataset.id,
        order_id=loader.plan_hash,
    )
    return loop.train(loop.set_up(job, stage, plan), stage)


class FineTuning(SupervisedStage[TraceBatch]):
    """The stage: the tokens of the completions have a loss."""

    def losses(self, engine: Any, batch: TraceBatch) -> Iterator[torch.Tensor]:
        group = self._job.group
        # DeepSpeed takes the mean over micro batches and ranks; here the sum over both is the mean wanted.
        weight = len(batch.tokens) * group.world_size / batch.num_loss_tokens
        micro_batches = zip(
            torch.from_numpy(batch.tokens).to(group.device),
            torch.from_numpy(batch.loss_mask).to(group.device),
            strict=True,
        )
        for tokens, mask in micro_batches:
            logits = engine(input_ids=tokens[:, :-1]).logits
            chosen = mask[:, 1:]
            total = F.cross_entropy(logits[chosen].float(), tokens[:, 1:][chosen], reduction="sum")
            yield total * weight

    def num_tokens(self, batch: TraceBatch) -> int:
        return batch.num_loss_tokens

    def seq_len(self, batch: TraceBatch) -> int:
        return int(batch.tokens.shape[-1])

    def meta(self, step: int) -> dict[str, Any]:
        # How many tokens a batch of completions has does not follow from the step.
        return {**super().meta(step), "tokens": self._tokens}

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        self._tokens = int(meta["tokens"])

    def finish(self, session: Session) -> bool:
        """Leave the model as a Hugging Face folder, for the stages that follow."""
        job = self._job
        job.watchdog.beat("exporting the model")
        export_model(session.engine.module, job.group, job.run.model, load_tokenizer(job.config.model))
        return True
