"""Whether ranks can share sequences as train.sequence_parallel asks, before anything is queued."""

from collections.abc import Mapping
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema import OWN_ATTENTIONS, Precision, RunConfig

_STAGES = ("pretrain", "sft")
_ATTENTIONS = ("sdpa", "softmax", *OWN_ATTENTIONS)
"""Those that are called with whole heads and a mask."""
_LENGTH_BOUND_ROPE = ("dynamic", "longrope", "su")
"""Rotary frequencies that follow from the longest position at hand, which differs between the ranks; `su` is
an older name for longrope."""


def check_sequence_parallel(config: RunConfig, ranks_per_node: int) -> None:
    """Refuse what settings and ranks of a node do not allow.

    Raises:
        ConfigError: what does not go together, and what to take instead.
    """
    size = config.train.sequence_parallel
    if size == 1:
        return
    asked = f"train.sequence_parallel={size}"
    if config.stage not in _STAGES:
        raise ConfigError(
            f"{asked} is for pretraining and fine-tuning only (stages {' and '.join(_STAGES)}), and the "
            f"stage is {config.stage}: leave it out"
        )
    if ranks_per_node % size:
        raise ConfigError(
            f"{asked} must divide the {ranks_per_node} ranks of a node, because those that share a sequence "
            f"are on one node: {_choices(ranks_per_node)}"
        )
    if config.data.seq_len % size:
        up = -(-config.data.seq_len // size) * size
        raise ConfigError(f"{asked} must divide data.seq_len={config.data.seq_len}: take data.seq_len={up}")
    if config.train.precision is Precision.fp8 and config.train.fp8_recipe == "tensorwise":
        raise ConfigError(
            f"{asked} does not go with train.fp8_recipe=tensorwise, whose scales are of the tokens that a "
            "rank holds: take train.fp8_recipe=rowwise"
        )
    if config.data.packing:
        raise ConfigError(f"{asked} does not go with data.packing: set data.packing=false, or {asked[:-1]}1")
    if config.model.attn_implementation not in _ATTENTIONS:
        raise ConfigError(
            f"{asked} does not go with model.attn_implementation={config.model.attn_implementation}: take "
            f"one of {', '.join(_ATTENTIONS)} (on GPUs sdpa is torch's own flash attention)"
        )


def check_model_divides(config: RunConfig, model: Mapping[str, Any]) -> None:
    """Refuse heads that do not divide, and positions that do not; works on any model_type.

    What a config does not tell, a state along the sequence for example, is tried on the ranks.

    Args:
        model: a config.json under Llama's names (plan.shape.canonical).

    Raises:
        ConfigError: says which number of ranks would do.
    """
    size = config.train.sequence_parallel
    if size == 1:
        return
    heads = model.get("num_attention_heads")
    groups = model.get("num_key_value_heads") or heads
    if isinstance(heads, int) and isinstance(groups, int) and (heads % size or groups % size):
        raise ConfigError(
            f"train.sequence_parallel={size} must divide the model's {heads} attention heads and {groups} "
            f"key-value heads: {_choices(groups)}"
        )
    found = [name for name in _LENGTH_BOUND_ROPE if name in rope_types(model)]
    if found:
        raise ConfigError(
            f"train.sequence_parallel={size}: the model's rotary frequencies ({found[0]}) follow from the "
            "length of what a rank holds, and would differ between the ranks: set train.sequence_parallel=1"
        )


def _choices(number: int) -> str:
    """What divides it, as a request."""
    return f"take one of {', '.join(str(n) for n in range(1, number + 1) if number % n == 0)}"


def rope_types(values: Any) -> set[str]:
    """Of a config.json, wherever they stand in it."""
    if not isinstance(values, Mapping):
        return set()
    own = {str(values[key]) for key in ("rope_type", "type") if key in values}
    return own.union(*map(rope_types, values.values()))
