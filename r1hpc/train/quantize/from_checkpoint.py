"""Export a checkpoint's model as a Hugging Face folder, in one process, without GPU or the run's ranks.

The weights are those that a run ending at this step would leave in its `model/`: in its training precision,
with adapters merged and without a critic.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from r1hpc.checkpoint.store import Checkpoint
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.text.tokenizer import TokenizerFiles
from r1hpc.train.checkpoint.deepspeed_io import load_file
from r1hpc.train.model.export import export_model
from r1hpc.train.model.low_precision import holds_nf4, load_adapters
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import ResumeError
from r1hpc.train.rollout.policy import DTYPES, build_policy

_TAG = "deepspeed"
_CRITIC = "value_head.weight"
"""A weight that only PPO's module has, which holds the policy beside its critic."""


class _Alone(Group):
    """The group of a single process."""

    def broadcast(self, value: Any) -> Any:
        return value


def export_checkpoint(
    config: RunConfig,
    checkpoint: Checkpoint,
    folder: Path,
    tokenizer: TokenizerFiles | None,
    vocab_size: int | None = None,
) -> None:
    """Write the model of a verified checkpoint of a run into `folder`, as export_model does.

    `vocab_size` is the dataset's, for a model whose config leaves it out. Raise ResumeError if the weights
    are not those of the run's model.
    """
    if checkpoint.manifest.meta["zero_stage"] == 3:  # each rank holds a part
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path), _TAG)
    else:
        weights = load_file(checkpoint.path / _TAG / "mp_rank_00_model_states.pt")["module"]
    if _CRITIC in weights:
        weights = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    lie = Placement(DTYPES[config.train.precision], torch.device("cpu"))
    network = build_policy(config, load_model_config(config, vocab_size), lie)
    try:
        if holds_nf4(network):
            load_adapters(weights, network)
        else:
            network.load_state_dict(weights)
    except (RuntimeError, ResumeError) as error:
        raise ResumeError(f"{checkpoint.path} does not hold the run's model: {error}") from None
    export_model(network, _Alone(0, 0, 1, torch.device("cpu")), folder, tokenizer)
