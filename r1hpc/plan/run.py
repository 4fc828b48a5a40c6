"""Make a run's plan (plan.json) from its configuration: batch, memory, size and time of a save.

`submit` and `estimate` make it before GPUs are requested. hours/estimate_run.py computes GPU-hours from it.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, TypedDict

from r1hpc.base.errors import ConfigError, StateError
from r1hpc.base.records import mistake
from r1hpc.base.units import format_bytes, format_duration, gpu_hours
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import find_workload, in_parts, is_rl, is_server, loads_model, samples
from r1hpc.plan.memory.fit import way_out
from r1hpc.plan.memory.run import (
    COMMON_CARD_GIB,
    asked_host_gib,
    copied_bytes,
    memory_of_run,
    misfits,
    saved_bytes,
)
from r1hpc.plan.memory.step import MemoryPlan
from r1hpc.plan.model.families import FAMILIES, UnknownModelError
from r1hpc.plan.model.shape import (
    ModelShape,
    canonical,
    check_heads,
    check_model_type,
    flops_per_token,
    load_model_config,
    load_teacher_config,
    model_shape,
)
from r1hpc.plan.save_time import ASSUMED_SPEED, SaveSpeed, expected_copy_time_s, expected_save_time_s
from r1hpc.plan.topology.batch import BatchPlan, Topology, batch_of, ranks_per_node
from r1hpc.plan.topology.checks import check_model_divides, check_sequence_parallel
from r1hpc.plan.topology.gpus import gpu_type_of, known_card
from r1hpc.plan.topology.parts import num_parts, with_part_size


class PlanBatch(TypedDict):
    """The part of plan.json about which ranks read which samples."""

    topology: Topology
    batch: BatchPlan


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. None: unknown, because the model's shape or the time limit is."""

    topology: Topology
    batch: BatchPlan
    num_steps: int
    seq_len: int
    tokens_per_step: int
    total_tokens: int
    num_parameters: int | None
    flops_per_token: float | None
    """Model FLOPs, with the full square of attention scores (PaLM convention)."""
    memory: MemoryPlan | None
    checkpoint_bytes: int | None
    save_time_s: float | None
    """Expected, from the start of a save to its commit."""
    time_limit_s: int | None
    gpu_hours_ceiling: float | None
    """GPUs x time limit: the most one attempt can cost. 0 for a CPU run."""
    node_hours_ceiling: float | None
    save_speed: SaveSpeed | None = None
    """The basis of save_time_s."""
    save_wait_s: float | None = None
    """The part of it in which training waits; all of it if saves are not asynchronous."""
    copy_rank_bytes: int | None = None
    """Host memory per rank for an asynchronous save's copy; 0: saves are synchronous."""
    copy_node_bytes: int | None = None
    """The same per node."""
    teacher_parameters: int | None = None
    """Parameters of rl.teacher, if there is one and its family is known."""
    teacher_active_parameters: int | None = None
    """Its parameters that one token meets."""
    warning_window_s: int | None = None
    """From the first signal of a preemption to the end; None: unknown, or nobody preempts."""
    account: str | None = None
    """Charged by Slurm; None: the user's default one."""
    first_item: int = 0
    """The task item where reinforcement learning begins."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory and self.memory.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RunPlan":
        """Parse the result of to_json. Keys this version does not know are left out.

        Raise StateError with the key if one is missing or of another shape.
        """
        wrong = mistake(value, RunPlan)
        if wrong is not None:
            raise StateError(f"plan.json is of another version of r1hpc, or damaged: {wrong}; submit again")
        known = _known(RunPlan, value)
        known["topology"] = Topology(**_known(Topology, value["topology"]))
        known["batch"] = BatchPlan(**_known(BatchPlan, value["batch"]))
        if known.get("save_speed") is not None:
            known["save_speed"] = SaveSpeed(**_known(SaveSpeed, known["save_speed"]))
        if value["memory"] is not None:
            known["memory"] = MemoryPlan(**_known(MemoryPlan, value["memory"]))
        return RunPlan(**known)


def make_plan(
    config: RunConfig,
    *,
    gpus_per_node: int,
    vocab_size: int | None = None,
    time_limit_s: int | None = None,
    num_nodes: int | None = None,
    max_nodes: int | None = None,
    expected_model: Mapping[str, Any] | None = None,
    expected_teacher: Mapping[str, Any] | None = None,
    save_speed: SaveSpeed | None = None,
) -> RunPlan:
    """Return the plan of `config` on `num_nodes` (None: resources.nodes) of `gpus_per_node` (0: a CPU run).

    Raise ConfigError if it is impossible: a batch that does not divide, a sequence longer than the model's
    positions, heads that do not divide, ranks that cannot share a sequence.

    Args:
        vocab_size: the dataset's, for a model whose config leaves it out. None if unknown so far: then
            nothing is known that depends on the number of parameters.
        max_nodes: most nodes of a job here, for an error's list of legal choices and fitting plans. None:
            unknown.
        expected_model: the config.json that an earlier stage will leave in model.path.
        expected_teacher: the same of rl.teacher.
        save_speed: as measured; checkpoint.assumed_bandwidth_gib_s wins over it.
    """
    ranks = ranks_per_node(config, gpus_per_node)
    topology = Topology(num_nodes or config.resources.nodes, ranks, gpus_per_node)
    steps = num_steps(config, topology.world_size)
    seq_len, _ = _longest_sequence(config)
    if config.train.sequence_parallel > 1:
        check_sequence_parallel(config, ranks)
    batch = batch_of(config, topology, max_nodes)
    shape = _shape(config, vocab_size, expected_model)
    flops = flops_per_token(shape, seq_len) if shape else None
    is_taught = is_rl(config.stage) and config.rl.teacher is not None
    teacher = _teacher_shape(config, expected_teacher) if is_taught else None
    teacher_parameters = teacher.num_parameters if teacher else None
    memory = None
    if shape and (teacher or not is_taught):
        memory = _memory(config, shape, topology, seq_len, teacher_parameters, max_nodes)
    size = saved_bytes(config, shape, topology.world_size) if shape and not is_server(config.stage) else None
    if config.checkpoint.assumed_bandwidth_gib_s is not None:
        given = config.checkpoint.assumed_bandwidth_gib_s
        save_speed = SaveSpeed(given, "given: checkpoint.assumed_bandwidth_gib_s")
    save_speed = save_speed or ASSUMED_SPEED
    save_s = None if size is None else expected_save_time_s(size, save_speed.gib_s)
    wait_s, copies = save_s, (0, 0) if size is not None else (None, None)
    if shape and size is not None and config.checkpoint.asynchronous:
        copies = copied_bytes(config, shape, topology)
        wait_s = expected_copy_time_s(copies[0], on_gpu=bool(gpus_per_node))
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
        save_time_s=save_s,
        time_limit_s=time_limit_s,
        gpu_hours_ceiling=None if time_limit_s is None else gpu_hours(topology.num_gpus, time_limit_s),
        node_hours_ceiling=None if time_limit_s is None else topology.num_nodes * time_limit_s / 3600,
        save_speed=save_speed,
        save_wait_s=wait_s,
        copy_rank_bytes=copies[0],
        copy_node_bytes=copies[1],
        teacher_parameters=teacher_parameters,
        teacher_active_parameters=teacher.num_active_parameters if teacher else None,
        account=config.resources.account or config.cluster.account,
        first_item=(config.task.first_item or 0) if is_rl(config.stage) else 0,
    )


def describe_save(plan: RunPlan) -> list[str]:
    """Explain how long a save takes, in sentences; empty if the size of the model is unknown."""
    if plan.save_time_s is None or plan.checkpoint_bytes is None or plan.save_speed is None:
        return []
    speed = f"{plan.save_speed.gib_s:.2g} GiB/s ({plan.save_speed.source})"
    lines = [f"save: {format_bytes(plan.checkpoint_bytes)} at {speed}"]
    if plan.copy_node_bytes and plan.copy_rank_bytes and plan.save_wait_s is not None:
        lines.append(
            f"training waits {format_duration(plan.save_wait_s)} of a save, for a copy in host memory: "
            f"{format_bytes(plan.copy_node_bytes)} on a node, {format_bytes(plan.copy_rank_bytes)} a rank"
        )
    return lines


def _memory(
    config: RunConfig,
    shape: ModelShape,
    topology: Topology,
    seq_len: int,
    teacher_parameters: int | None,
    max_nodes: int | None,
) -> MemoryPlan:
    gpu = known_card(gpu_type_of(config)) if topology.num_gpus else None
    card = gpu.memory_gib if gpu else COMMON_CARD_GIB
    memory = memory_of_run(config, shape, topology, seq_len, card, teacher_parameters)
    must_fit = topology.num_gpus and not is_server(config.stage)
    if must_fit and [*misfits(memory, gpu_gib=card, host_gib=None)]:
        host = asked_host_gib(config)
        found = way_out(config, shape, topology, seq_len, card, teacher_parameters, max_nodes, host)
        return replace(memory, way_out=found)
    return memory


def _longest_sequence(config: RunConfig) -> tuple[int, str]:
    """Return the tokens of the longest sequence the model sees, and the settings behind it."""
    if samples(config.stage):
        length = config.rollout.max_prompt_length + config.rollout.max_completion_length
        return length, "rollout.max_prompt_length + rollout.max_completion_length"
    if is_server(config.stage):
        return config.serve.max_model_len or 1, "serve.max_model_len"
    return config.data.seq_len, "data.seq_len"


def num_steps(config: RunConfig, num_ranks: int) -> int:
    """Return the optimizer steps, or the parts of a stage without them; 0 if the plan cannot know."""
    if in_parts(config.stage):
        return num_parts(with_part_size(config, num_ranks))
    return find_workload(config.stage).steps(config) or 0


def _known(schema: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass from a JSON object that has all those without a default."""
    return {f.name: value[f.name] for f in fields(schema) if f.default is MISSING or f.name in value}


def _teacher_shape(config: RunConfig, expected: Mapping[str, Any] | None) -> ModelShape | None:
    model = load_teacher_config(config, expected)
    if model is None:
        return None
    values = canonical(model)
    _check_positions(config, values.get("max_position_embeddings"), "rl.teacher")
    try:
        return model_shape(model)
    except UnknownModelError:
        check_model_type(model["model_type"])
        return None


def _shape(
    config: RunConfig, vocab_size: int | None, expected: Mapping[str, Any] | None
) -> ModelShape | None:
    """Return the model's shape; None if its family or vocabulary is unknown, or no model is loaded."""
    if not loads_model(config.stage):
        return None
    model = load_model_config(config, vocab_size, expected)
    values = canonical(model)
    check_heads(values)
    if config.train.sequence_parallel > 1:
        check_model_divides(config, values)
    try:
        shape = model_shape(model)
    except UnknownModelError:
        check_model_type(model["model_type"])
        shape = None
    positions = shape.max_position_embeddings if shape else values.get("max_position_embeddings")
    has_weights = config.model.path is not None and not config.model.from_scratch
    family = FAMILIES.get(str(values.get("model_type")))
    is_fixed = has_weights and family is not None and family.learned_positions
    hint = "" if is_fixed else ", or raise model.config.max_position_embeddings"
    _check_positions(config, positions, "the model", hint)
    return shape if model.get("vocab_size") is not None else None


def _check_positions(config: RunConfig, positions: Any, whose: str, hint: str = "") -> None:
    seq_len, settings = _longest_sequence(config)
    if isinstance(positions, int) and seq_len > positions:
        raise ConfigError(f"{settings} is {seq_len}, but {whose} has {positions} positions: lower it{hint}")
