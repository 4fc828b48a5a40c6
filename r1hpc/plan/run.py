"""The plan of a run: everything that follows from its configuration before a GPU is asked for.

plan = make_plan(config, gpus_per_node=8, vocab_size=32000, time_limit_s=86400)
write_json(run.plan, plan.to_json());  RunPlan.from_json(read_json(run.plan)) == plan
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from r1hpc.base.errors import ConfigError, StateError
from r1hpc.base.units import gpu_hours
from r1hpc.config.schema import RunConfig
from r1hpc.plan.batch import BatchPlan, Topology, batch_of
from r1hpc.plan.families import UnknownModelError
from r1hpc.plan.memory import MemoryPlan, checkpoint_bytes, memory_per_gpu
from r1hpc.plan.model import load_model_config
from r1hpc.plan.parts import num_parts
from r1hpc.plan.preemption import expected_save_time_s
from r1hpc.plan.shape import ModelShape, canonical, check_heads, flops_per_token, model_shape


@dataclass(frozen=True)
class RunPlan:
    """What a run will do. None: not known, because the model's shape or the time limit is not."""

    topology: Topology
    batch: BatchPlan
    num_steps: int
    seq_len: int
    tokens_per_step: int
    total_tokens: int
    num_parameters: int | None
    flops_per_token: float | None
    """Model FLOPs, the full square of attention scores counted (PaLM convention)."""
    memory: MemoryPlan | None
    checkpoint_bytes: int | None
    save_time_s: float | None
    """Expected, from checkpoint.assumed_bandwidth_gib_s."""
    time_limit_s: int | None
    gpu_hours_ceiling: float | None
    """GPUs x time limit: the most one attempt can cost. 0 for a CPU run."""
    node_hours_ceiling: float | None

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.memory is not None:
            value["memory"]["total_gib"] = self.memory.total_gib
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RunPlan":
        """What to_json gave. Keys this version does not know are left out.

        Raises:
            StateError: a key is missing or of another shape.
        """
        try:
            known = _known(RunPlan, value)
            known["topology"] = Topology(**_known(Topology, value["topology"]))
            known["batch"] = BatchPlan(**_known(BatchPlan, value["batch"]))
            if value["memory"] is not None:
                known["memory"] = MemoryPlan(**_known(MemoryPlan, value["memory"]))
        except (KeyError, TypeError) as error:
            raise StateError(
                f"plan.json is from another version of r1hpc ({error!r}); submit again"
            ) from None
        return RunPlan(**known)


def make_plan(
    config: RunConfig,
    *,
    gpus_per_node: int,
    vocab_size: int | None = None,
    time_limit_s: int | None = None,
    num_nodes: int | None = None,
    expected_model: Mapping[str, Any] | None = None,
) -> RunPlan:
    """The plan of `config` on `num_nodes` (None: resources.nodes) of `gpus_per_node` (0: a CPU run).

    Args:
        vocab_size: the dataset's, for a model whose config leaves it out. None where that is not known
            yet: then nothing that depends on the number of parameters is.
        expected_model: the config.json that an earlier stage will leave in model.path.

    Raises:
        ConfigError: what cannot be: a batch that does not divide, a sequence longer than the model's
            positions, heads that do not divide.
    """
    ranks = gpus_per_node or config.resources.ranks_per_node
    topology = Topology(num_nodes or config.resources.nodes, ranks, gpus_per_node)
    train, steps = config.train, num_steps(config)
    seq_len, _ = _longest_sequence(config)
    batch = batch_of(config, topology)
    shape = _shape(config, vocab_size, expected_model)
    flops = flops_per_token(shape, seq_len) if shape else None
    memory = None
    if shape:
        memory = memory_per_gpu(
            shape,
            zero_stage=config.deepspeed.zero_stage,
            world_size=topology.world_size,
            precision=train.precision,
            micro_batch_size=train.micro_batch_size,
            seq_len=seq_len,
            activation_checkpointing=config.model.activation_checkpointing,
        )
    size = checkpoint_bytes(shape, train.precision, config.deepspeed.zero_stage) if shape else None
    bandwidth = config.checkpoint.assumed_bandwidth_gib_s
    tokens = batch.global_batch_size * seq_len
    return RunPlan(
        topology=topology,
        batch=batch,
        num_steps=steps,
        seq_len=seq_len,
        tokens_per_step=tokens,
        total_tokens=tokens * steps,
        num_parameters=shape.num_parameters if shape else None,
        flops_per_token=flops,
        memory=memory,
        checkpoint_bytes=size,
        save_time_s=None if size is None else expected_save_time_s(size, bandwidth),
        time_limit_s=time_limit_s,
        gpu_hours_ceiling=None if time_limit_s is None else gpu_hours(topology.num_gpus, time_limit_s),
        node_hours_ceiling=None if time_limit_s is None else topology.num_nodes * time_limit_s / 3600,
    )


def _longest_sequence(config: RunConfig) -> tuple[int, str]:
    """Tokens of the longest sequence the model sees, and the settings that say so."""
    if config.stage in ("rl", "generate", "evaluate"):
        length = config.rollout.max_prompt_length + config.rollout.max_completion_length
        return length, "rollout.max_prompt_length + rollout.max_completion_length"
    return config.data.seq_len, "data.seq_len"


def num_steps(config: RunConfig) -> int:
    """Optimizer steps, or parts where there are none."""
    if config.stage in ("traces", "generate", "evaluate"):
        return num_parts(config)
    return config.train.num_steps


def _known(schema: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass out of a JSON object; KeyError where one is missing."""
    return {field.name: value[field.name] for field in fields(schema)}


def _shape(
    config: RunConfig, vocab_size: int | None, expected: Mapping[str, Any] | None
) -> ModelShape | None:
    """The model's shape; None where its family or its vocabulary is not known, or no model is loaded."""
    if config.stage == "traces":  # demonstrations are computed
        return None
    model = load_model_config(config, vocab_size, expected)
    values = canonical(model)
    check_heads(values)
    try:
        shape = model_shape(model)
    except UnknownModelError:
        shape = None
    positions = shape.max_position_embeddings if shape else values.get("max_position_embeddings")
    seq_len, settings = _longest_sequence(config)
    if isinstance(positions, int) and seq_len > positions:
        raise ConfigError(
            f"{settings} is {seq_len}, but the model has {positions} positions: lower it, "
            "or raise model.config.max_position_embeddings"
        )
    return shape if model.get("vocab_size") is not None else None
