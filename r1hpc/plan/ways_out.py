"""What would make a run fit its cards: settings that were tried in its plan, the mildest first.

way_out(config, shape, topology, seq_len, card_gib=80)
# "it would fit with rollout.prompts_per_batch=1, or with model.lora_rank=16"

Settings are changed one at a time, then two together, and three where fewer do not do; what a run would
refuse is not proposed. The first ones cost time or the host's memory, more nodes cost GPUs, adapters train
something else. DeepSpeed's offload is not among them: nothing here was trained with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice, product
from typing import Any, NamedTuple

from r1hpc.base.errors import UsageError
from r1hpc.config.schema import SAMPLED_STAGES, TRAINED_STAGES, RunConfig
from r1hpc.plan.batch import Topology, batch_of
from r1hpc.plan.compression import check_compression
from r1hpc.plan.frozen import check_base, is_quantized
from r1hpc.plan.memory import reference_place
from r1hpc.plan.parts import evaluation_prompts, part_size, rollout_prompts
from r1hpc.plan.precision import check_precision
from r1hpc.plan.run_memory import memory_of_run, misfits, usable_gib
from r1hpc.plan.shape import ModelShape
from r1hpc.plan.vllm_memory import share_setting, vllm_memory

_MOST_TOGETHER = 3
_MOST_SAID = 3
_LORA_RANK = 16
_MORE_NODES = (2, 4, 8)


class _Change(NamedTuple):
    """A setting with another value."""

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
) -> str:
    """A sentence on what would make a run fit that does not.

    Args:
        seq_len, card_gib, teacher_parameters: as in `memory_of_run`.
        max_nodes: that a job may have. None: not known.
    """

    def words(changes: Sequence[_Change]) -> str | None:
        """What makes it fit, with these changes; None: they do not."""
        try:
            changed, where = _changed(config, topology, changes)
        except UsageError:
            return None
        share = _share_needed(changed, shape, where, seq_len, card_gib, teacher_parameters)
        return None if share is None else " and ".join([*map(str, changes), *filter(None, [share])])

    found = list(islice(_fitting(list(_settings(config, topology, max_nodes)), words), _MOST_SAID))
    if not found:
        return "no other setting that was tried makes it fit: take cards with more memory"
    return f"it would fit with {', or with '.join(found)}"


def _fitting(
    settings: Sequence[Sequence[_Change]], words: Callable[[Sequence[_Change]], str | None]
) -> Iterator[str]:
    """What `words` has to say of one setting changed, of two, and of three where fewer do not do; of each
    choice of settings the mildest values, and no choice that holds one which does by itself."""
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
    """The settings that there are to change, each with its other values, the mildest first."""
    model, nodes = config.model, topology.num_nodes
    places = {"whole": ("divided", "host"), "divided": ("host",)}.get(reference_place(config), ())
    yield [_Change("rl", "reference", place) for place in places]
    if config.stage in SAMPLED_STAGES and config.rollout.engine == "vllm":
        yield [_Change("rollout", "engine", "sampler")]
    if config.stage in SAMPLED_STAGES and config.rollout.engine == "sampler":
        together = _prompts_together(config, topology.world_size)
        yield [_Change("rollout", "prompts_per_batch", number) for number in _halves(together)]
    if config.stage not in TRAINED_STAGES:
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


def _prompts_together(config: RunConfig, num_ranks: int) -> int:
    """Prompts that a rank decodes together at most."""
    if config.stage == "rl":
        return max(rollout_prompts(config, num_ranks), evaluation_prompts(config, num_ranks))
    part = part_size(config, num_ranks)
    return min(config.rollout.prompts_per_batch or part, part)


def _halves(number: int) -> list[int]:
    """Half of it, a quarter ... down to 1."""
    return [number >> times for times in range(1, number.bit_length())]


def _changed(config: RunConfig, topology: Topology, changes: Sequence[_Change]) -> tuple[RunConfig, Topology]:
    """With other settings.

    Raises:
        UsageError: a run would refuse them.
    """
    decided = replace(config.resources, gpus_per_node=topology.gpus_per_node, nodes=topology.num_nodes)
    changed = replace(config, resources=decided)
    for section, key, value in changes:
        changed = replace(changed, **{section: replace(getattr(changed, section), **{key: value})})
    where = replace(topology, num_nodes=changed.resources.nodes)
    batch_of(changed, where)
    check_precision(changed)
    check_base(changed)
    check_compression(changed)
    return changed, where


def _share_needed(
    config: RunConfig,
    shape: ModelShape,
    topology: Topology,
    seq_len: int,
    card_gib: float,
    teacher_parameters: int | None,
) -> str | None:
    """The setting of vLLM's share with which a run fits, empty where it fits as it is; None: it does not."""
    plan = memory_of_run(config, shape, topology, seq_len, card_gib, teacher_parameters)
    if not list(misfits(plan, gpu_gib=card_gib, host_gib=None)):
        return ""
    vllm = vllm_memory(config, shape, topology, card_gib)
    training, room = plan.activations_gib + plan.logits_gib, usable_gib(card_gib) - plan.staying_gib
    if vllm is None or training > room:
        return None
    left = room if vllm.sleeps else room - training
    return share_setting(config, vllm, room_gib=left, card_gib=card_gib)
