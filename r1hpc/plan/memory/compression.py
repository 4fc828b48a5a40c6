"""Compute the gradient bytes that a step sends over slow links.

bytes_between_nodes(config, shape, topology)     # {"none": 4e9, "int8": 1e9, "powersgd": 6e7}
describe_gradients(config, bytes_)               # sentences for the plan
"""

from collections.abc import Mapping

from r1hpc.base.units import format_bytes
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import TRAINED_STAGES
from r1hpc.plan.memory.run import adapter_widths, num_trained
from r1hpc.plan.memory.step import WEIGHT_BYTES
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.batch import Topology

_INT8_BYTES = 1 + 4 / 256
"""Per value: the integer, and its part of a scale (train/parallel/compression.py)."""


def bytes_between_nodes(config: RunConfig, shape: ModelShape, topology: Topology) -> dict[str, float] | None:
    """Return the gradient bytes that leave each node per step, by train.gradient_compression.

    A ring crosses a node's links once, however many ranks the node has. The parts exchanged by int8 go from
    every rank to every other, so with several ranks on a node they cross several times.

    None: a stage without gradients, or ZeRO, which has other traffic.
    """
    is_asked = config.stage in TRAINED_STAGES and not config.deepspeed.zero_stage
    if not is_asked or config.model.lora_rank:
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


def describe_gradients(config: RunConfig, sent: Mapping[str, float]) -> list[str]:
    """Describe bytes_between_nodes, in seconds if cluster.network_gbit_s is known."""
    speed, asked = config.cluster.network_gbit_s, config.train.gradient_compression
    if speed is None and asked == "none":
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
