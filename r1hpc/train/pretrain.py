"""Pretraining: next-token prediction on windows of sharded text.

    outcome = run(job)      # on every rank

One optimizer step (train/supervised.py) is: read the rank's windows, forward and backward for each micro
batch, DeepSpeed's step, and one small all-reduce that also proves which samples were used.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from r1hpc.data.loader import BatchLoader, StepBatch
from r1hpc.data.mixture import open_plan
from r1hpc.data.reader import open_dataset
from r1hpc.plan.model import load_model_config
from r1hpc.train import loop
from r1hpc.train.loop import Job, Outcome
from r1hpc.train.model import build_model, next_token_loss
from r1hpc.train.supervised import SupervisedStage, batch_plan


def run(job: Job) -> Outcome:
    """Train until the last step or until a stop is requested."""
    loop.check_device(job)
    config, group, batch = job.config, job.group, batch_plan(job)
    assert job.dataset_path is not None, "begin sees to the dataset"
    dataset = open_dataset(job.dataset_path, verify=config.data.verify)
    order = open_plan(
        dataset,
        config.data.seq_len,
        config.data.seed,
        batch.global_batch_size,
        num_samples=config.train.num_steps * batch.global_batch_size,
    )
    hf_config = load_model_config(config, dataset.vocab_size)
    job.watchdog.beat("building the model")
    loader = BatchLoader(
        dataset,
        order,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=group.rank,
        world_size=group.world_size,
    )
    stage = Pretraining(job, loader.batch)
    plan = loop.Plan(
        network=build_model(config.model, hf_config, config.train.seed),
        hf_config=hf_config,
        batch=batch,
        data_id=dataset.id,
        order_id=order.plan_hash,
    )
    return loop.train(loop.set_up(job, stage, plan), stage)


class Pretraining(SupervisedStage[StepBatch]):
    """The stage: every position of every window has a loss."""

    def losses(self, engine: Any, batch: StepBatch) -> Iterator[torch.Tensor]:
        for micro_batch in torch.from_numpy(batch.tokens).to(self._job.group.device):
            logits = engine(input_ids=micro_batch[:, :-1]).logits
            yield next_token_loss(logits, micro_batch[:, 1:])

    def num_tokens(self, batch: StepBatch) -> int:
        train = self._job.config.train
        return train.global_batch_size * self.seq_len(batch)

    def seq_len(self, batch: StepBatch) -> int:
        return self._job.config.data.seq_len

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        self._tokens = int(meta["next_sample"]) * self._job.config.data.seq_len
