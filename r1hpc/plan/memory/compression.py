"""Check train.gradient_compression and ZeRO++ for slow links, and compute the bytes a step sends.

check_compression(config)                        # UsageError before anything is queued
bytes_between_nodes(config, shape, topology)     # {"none": 4e9, "int8": 1e9, "powersgd": 6e7}
describe_gradients(config, bytes_)               # sentences for the plan
"""

from collections.abc import Mapping
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_bytes
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.config.stages import TRAINED_STAGES
from r1hpc.plan.memory.frozen import QUANTIZED_WEIGHTS
from r1hpc.plan.memory.run import adapter_widths, num_trained
from r1hpc.plan.memory.step import WEIGHT_BYTES
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.batch import Topology

_INT8_BYTES = 1 + 4 / 256
"""Per value: the integer, and its part of a scale (train/parallel/compression.py)."""
_OF_ALL_REDUCE = (
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
    *("gradient_allreduce_op", "data_types", "torch_autocast"),
)
"""Keys of DeepSpeed's config for averaging gradients, which DeepSpeed then does not do."""
_QUANTIZED = (*QUANTIZED_WEIGHTS, "zero_quantized_gradients")


def check_compression(config: RunConfig) -> None:
    """Refuse impossible combinations; resources.gpus_per_node must be decided.

    Raises:
        UsageError: names the conflict and an alternative.
    """
    _check_zero_plus_plus(config)
    asked = config.train.gradient_compression
    if asked == "none":
        return
    setting = f"train.gradient_compression={asked}"
    if config.stage not in TRAINED_STAGES:
        raise UsageError(f"{setting} has no use in stage {config.stage}, which has no gradients: remove it")
    if config.deepspeed.zero_stage:
        raise UsageError(
            f"{setting} is for deepspeed.zero_stage=0, and this run has {config.deepspeed.zero_stage}, where "
            "DeepSpeed averages gradients in parts of its own: take zero_stage=0 if the memory plan allows, "
            "or train.gradient_compression=none; for ZeRO 3 see ZeRO++ in docs/training.md"
        )
    if config.model.lora_rank:
        raise UsageError(
            f"{setting}: the gradients of adapters (model.lora_rank={config.model.lora_rank}) are small as "
            "they are: take train.gradient_compression=none"
        )
    if config.train.precision is Precision.fp16:
        raise UsageError(
            f"{setting} does not go with train.precision=fp16: what a step leaves to the next is of the loss "
            "scale of the moment, and an overflow would stay in it; take bf16 or fp32"
        )
    for key in _OF_ALL_REDUCE:
        if key in config.deepspeed.extra:
            raise UsageError(
                f"{setting}: deepspeed.extra.{key} is of the all-reduce that it replaces: leave one out"
            )


def _check_zero_plus_plus(config: RunConfig) -> None:
    near = _zero(config).get("zero_hpz_partition_size")
    asked = ["zero_hpz_partition_size"] if isinstance(near, int) and near > 1 else []
    asked += [key for key in _QUANTIZED if _zero(config).get(key)]
    if not asked:
        return
    names = ", ".join(f"deepspeed.extra.zero_optimization.{key}" for key in asked)
    if config.deepspeed.zero_stage != 3:
        raise UsageError(f"{names}: ZeRO++ is of deepspeed.zero_stage=3, and this run has another: remove it")
    if not config.resources.gpus_per_node and (quantized := [key for key in asked if key in _QUANTIZED]):
        raise UsageError(
            f"deepspeed.extra.zero_optimization.{quantized[0]}: DeepSpeed has CUDA kernels for it only, and "
            "resources.gpus_per_node is 0: remove it; zero_hpz_partition_size works on CPUs too"
        )
    resources = config.resources
    ranks = resources.nodes * (resources.gpus_per_node or resources.ranks_per_node)
    if isinstance(near, int) and near > 1 and ranks % near:
        raise UsageError(
            f"deepspeed.extra.zero_optimization.zero_hpz_partition_size: the run has {ranks} ranks, which "
            f"{near} does not divide: take the number of ranks on a node"
        )


def bytes_between_nodes(config: RunConfig, shape: ModelShape, topology: Topology) -> dict[str, float] | None:
    """Return the gradient bytes that leave each node per step, by train.gradient_compression.

    A ring crosses a node's links once, however many ranks the node has. The parts exchanged by int8 go from
    every rank to every other, so with several ranks on a node they cross several times.

    None: a stage without gradients, ZeRO, which has other traffic, or one node, which sends nothing.
    """
    is_asked = config.stage in TRAINED_STAGES and not config.deepspeed.zero_stage
    if not is_asked or config.model.lora_rank or topology.num_nodes < 2:
        return None
    ranks, on_node = topology.world_size, topology.ranks_per_node
    ring = (ranks - 1) / ranks
    num = num_trained(config, shape)
    exchanged = on_node * (ranks - on_node) / ranks + ring
    return {
        "none": 2 * ring * num * WEIGHT_BYTES[config.train.precision],
        "int8": exchanged * num * _INT8_BYTES,
        "powersgd": 2 * ring * 4 * _factor_values(config.train.compression_rank, shape),
    }


def _factor_values(rank: int, shape: ModelShape) -> int:
    """Count the values of the two factors of all matrices; vectors are too few to count."""
    tables = 2 if shape.num_parameters > shape.num_body_parameters else 1
    return rank * (adapter_widths(shape) + tables * (shape.vocab_size + shape.hidden_size))


def describe_gradients(config: RunConfig, sent: Mapping[str, float] | None) -> list[str]:
    """Describe bytes_between_nodes, in seconds if cluster.network_gbit_s is known."""
    speed, asked = config.cluster.network_gbit_s, config.train.gradient_compression
    if sent is None or (speed is None and asked == "none"):
        return []
    if speed is None:
        return [
            f"gradients: {format_bytes(round(sent[asked]))} leave each node in a step ({asked}), "
            f"{format_bytes(round(sent['none']))} without compression; whether that pays is not known "
            "without cluster.network_gbit_s"
        ]
    seconds = {name: num_bytes * 8e-9 / speed for name, num_bytes in sent.items()}
    words = [f"{name} {_duration(seconds[name])} ({format_bytes(round(sent[name]))})" for name in sent]
    saved = seconds["none"] - seconds[asked]
    if asked == "none":
        advice = "what each does to the loss: docs/training.md"
    elif saved > 0:
        advice = f"{asked} saves {_duration(saved)} of a step, less what its own arithmetic takes"
    else:
        advice = f"{asked} does not pay here: it sends more than no compression"
    return [f"gradients between nodes at {speed:g} Gbit/s, a step: {', '.join(words)}; {advice}"]


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"


def _zero(config: RunConfig) -> Mapping[str, Any]:
    found = config.deepspeed.extra.get("zero_optimization", {})
    return found if isinstance(found, dict) else {}
