"""Pretrain: next-token prediction on windows of sharded text.

    outcome = run(job)      # on every rank

One optimizer step (supervised.py) reads the rank's windows, runs forward and backward for each micro batch
and DeepSpeed's step, and one small all-reduce that also proves which samples were used.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r1hpc.attempt.workload import Outcome
from r1hpc.config.schema.run import ModelConfig
from r1hpc.data.read.loader import BatchLoader, StepBatch
from r1hpc.data.read.reader import TokenDataset, open_dataset
from r1hpc.data.read.sampler import open_plan
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.text.tokenizer import TokenizerFiles, check_data_tokens, exported_tokenizer
from r1hpc.train.loop import loop
from r1hpc.train.loop.session import Job, Plan
from r1hpc.train.model.sequence import SequenceGroup, share_sequences
from r1hpc.train.rollout.policy import build_policy, placement
from r1hpc.train.supervised.mixing import Mixing
from r1hpc.train.supervised.supervised import SupervisedStage, batch_plan, open_once


def run(job: Job) -> Outcome:
    """Train until the last step or until a stop is requested."""
    loop.check_device(job)
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
    mixing = Mixing(loader, config)
    stage = Pretraining(job, loader.batch, mixing, sequence, tokenizer_of_data(dataset))
    plan = Plan(
        network=build_policy(config, hf_config, placement(config, group, divided=True)),
        hf_config=hf_config,
        batch=batch,
        data_id=dataset.id,
        order_id=mixing.base_id,
    )
    return loop.train(loop.set_up(job, stage, plan), stage)


def tokenizer_of_data(dataset: TokenDataset) -> TokenizerFiles:
    """Return a dataset's tokenizer and end-of-document id; for a dataset of ids, the id alone."""
    folder, end = dataset.tokenizer_path, dataset.eos_id
    if folder is None:
        return TokenizerFiles({}, (end,))
    return exported_tokenizer(ModelConfig(tokenizer=str(folder)), end)


class Pretraining(SupervisedStage[StepBatch]):
    """The stage: every position of every window has a loss."""

    def __init__(
        self,
        job: Job,
        batch_of: Callable[[int], StepBatch],
        mixing: Mixing,
        sequence: SequenceGroup,
        tokenizer: TokenizerFiles,
    ) -> None:
        """`tokenizer` is the one the data was made with."""
        super().__init__(job, batch_of, mixing, sequence)
        self._tokenizer = tokenizer

    def losses(self, engine: Any, batch: StepBatch) -> Iterator[torch.Tensor]:
        part = self._sequence.part
        micro_batches = torch.from_numpy(batch.tokens).to(self._job.group.device)
        # Every rank has equally many, so the mean over the ranks is the mean over all targets.
        num_targets = part(micro_batches[..., 1:]).numel()
        for micro_batch in self.last_marked(engine, micro_batches):
            inputs, targets = part(micro_batch[:, :-1]), part(micro_batch[:, 1:])
            yield self.cross_entropy(engine, inputs, targets) / num_targets

    def num_tokens(self, batch: StepBatch) -> int:
        train = self._job.config.train
        return train.global_batch_size * self._job.config.data.seq_len

    def computed(self, batch: StepBatch) -> tuple[int, int]:
        return self.num_tokens(batch), self._job.config.data.seq_len

    def tokenizer_files(self) -> TokenizerFiles:
        return self._tokenizer

    def tokens_in(self, meta: dict[str, Any]) -> int:
        return int(meta["next_sample"]) * self._job.config.data.seq_len
