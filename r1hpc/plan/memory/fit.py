"""Suggest to `submit` settings with which a run that does not fit its GPUs would fit, the mildest first.

Settings are changed one at a time, then two together, then three if needed, and tried in the memory plan;
nothing is proposed that a run would refuse. The first ones cost time or host memory, more nodes cost GPUs,
adapters train something else. DeepSpeed's offload is not proposed: nothing here was trained with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice, product
from typing import Any, NamedTuple

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import samples, trains
from r1hpc.plan.memory.run import memory_of_run, misfits, usable_gib
from r1hpc.plan.memory.step import MemoryPlan, reference_place
from r1hpc.plan.memory.vllm import share_setting, vllm_memory
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.batch import Topology, batch_of
from r1hpc.plan.topology.checks import check_layout, check_nf4, is_quantized
from r1hpc.plan.topology.parts import prompts_together

_MOST_TOGETHER = 3
_MOST_SAID = 3
_LORA_RANK = 16
_MORE_NODES = (2, 4, 8)


class _Change(NamedTuple):
    section: str
    key: str
    value: Any

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.section}.{self.key}={value}"


def way_out(
    config: RunConfig,
    shape: ModelShape,
    topology: Topology,
    seq_len: int,
    card_gib: float,
    teacher_parameters: int | None = None,
    max_nodes: int | None = None,
    host_gib: float | None = None,
) -> str:
    """Return a sentence on how to make a run fit.

    Args:
        seq_len, card_gib, teacher_parameters: as in `memory_of_run`.
        max_nodes: most nodes of a job. None: unknown.
        host_gib: memory the job requests per node; proposals stay within it, or within the run's own need if
            that is more. None: unknown.
    """
    as_it_is = memory_of_run(config, shape, topology, seq_len, card_gib, teacher_parameters)
    most_of_host = None if host_gib is None else max(host_gib, as_it_is.host_gib)

    def words(changes: Sequence[_Change]) -> str | None:
        """Return the description if these changes make it fit, else None."""
        try:
            changed, where, changes = _changed(config, shape, topology, changes)
        except UsageError:
            return None
        plan = memory_of_run(changed, shape, where, seq_len, card_gib, teacher_parameters)
        if list(misfits(plan, gpu_gib=None, host_gib=most_of_host)):
            return None
        share = _share_needed(plan, changed, shape, where, card_gib)
        if share is None:
            return None
        return " and ".join([*map(str, changes), *filter(None, [share])])

    found = list(islice(_fitting(list(_settings(config, topology, max_nodes)), words), _MOST_SAID))
    if not found:
        return "no other setting that was tried makes it fit: take cards with more memory"
    return f"it would fit with {', or with '.join(found)}"


def _fitting(
    settings: Sequence[Sequence[_Change]], words: Callable[[Sequence[_Change]], str | None]
) -> Iterator[str]:
    """Yield the results of `words` for one setting changed, then two, then three if fewer do not fit; of each
    choice the mildest values, without settings that already fit alone."""
    done: list[set[int]] = []
    for number in range(_MOST_TOGETHER + 1):
        if number == _MOST_TOGETHER and done:
            return
        for chosen in combinations(range(len(settings)), number):
            if any(each <= set(chosen) for each in done):
                continue
            said = next(filter(None, map(words, product(*(settings[at] for at in chosen)))), None)
            if said is not None:
                done.append(set(chosen))
                yield said


def _settings(config: RunConfig, topology: Topology, max_nodes: int | None) -> Iterator[list[_Change]]:
    """Yield the settings that can change, each with its other values, the mildest first."""
    model, nodes = config.model, topology.num_nodes
    places = {"whole": ("divided", "host"), "divided": ("host",)}.get(reference_place(config), ())
    yield [_Change("rl", "reference", place) for place in places]
    if samples(config.stage) and config.rollout.engine == "vllm":
        yield [_Change("rollout", "engine", "sampler")]
    if samples(config.stage) and config.rollout.engine == "sampler":
        together = prompts_together(config, topology.world_size)
        yield [_Change("rollout", "prompts_per_batch", number) for number in _halves(together)]
    if not trains(config.stage):
        return
    yield [_Change("train", "micro_batch_size", size) for size in _halves(config.train.micro_batch_size)]
    yield [] if model.activation_checkpointing else [_Change("model", "activation_checkpointing", True)]
    higher = [stage for stage in (2, 3) if stage > config.deepspeed.zero_stage]
    yield [_Change("deepspeed", "zero_stage", stage) for stage in higher]
    wider = [nodes * more for more in _MORE_NODES if max_nodes is None or nodes * more <= max_nodes]
    yield [_Change("resources", "nodes", number) for number in wider]
    if model.path is not None and not model.from_scratch:
        yield [] if model.lora_rank else [_Change("model", "lora_rank", _LORA_RANK)]
        yield [] if is_quantized(config) else [_Change("model", "base_quantization", "nf4")]


def _halves(number: int) -> list[int]:
    return [number >> times for times in range(1, number.bit_length())]


def _changed(
    config: RunConfig, shape: ModelShape, topology: Topology, changes: Sequence[_Change]
) -> tuple[RunConfig, Topology, list[_Change]]:
    """Return the run with changed settings, and these with the accumulation that gives the global batch, if
    another one is set. Raise UsageError if a run would refuse them."""
    decided = replace(config.resources, gpus_per_node=topology.gpus_per_node, nodes=topology.num_nodes)
    changed = replace(config, resources=decided)
    for change in changes:
        changed = _with(changed, change)
    where = replace(topology, num_nodes=changed.resources.nodes)
    key, given = "gradient_accumulation_steps", changed.train.gradient_accumulation_steps
    steps = batch_of(_with(changed, _Change("train", key, None)), where).gradient_accumulation_steps
    follows = []
    if trains(changed.stage) and given not in (None, steps):
        follows = [_Change("train", key, steps)]
        changed = _with(changed, *follows)
    check_layout(changed)
    if is_quantized(changed):
        check_nf4(shape)
    return changed, where, [*changes, *follows]


def _with(config: RunConfig, change: _Change) -> RunConfig:
    section = replace(getattr(config, change.section), **{change.key: change.value})
    return replace(config, **{change.section: section})


def _share_needed(
    plan: MemoryPlan, config: RunConfig, shape: ModelShape, topology: Topology, card_gib: float
) -> str | None:
    """Return the vLLM share with which this plan fits, empty if it fits already; None: no share does."""
    if not list(misfits(plan, gpu_gib=card_gib, host_gib=None)):
        return ""
    vllm = vllm_memory(config, shape, topology, card_gib)
    if vllm is None or plan.update_gib > usable_gib(card_gib) - plan.staying_gib:
        return None
    room = usable_gib(card_gib) - plan.staying_gib - (0.0 if vllm.sleeps else plan.update_gib)
    return share_setting(config, vllm, room_gib=room, card_gib=card_gib)
