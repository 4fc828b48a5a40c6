"""Cut stages traces, generate and evaluate into parts, and count the prompts that a rank decodes together.

A part is a file with its number, so its number of items stays as set by the first submission, on whatever
ranks the run continues. Stage rl has no parts; its rollouts and evaluations are counted here too.
"""

from dataclasses import replace

from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import in_parts, is_rl

DEFAULT_NUM_HELD_OUT = 256
"""Default of evaluate.num_items for held-out items; of a test file all are used."""
_PARTS_PER_RANK = 4
"""An interrupted rank loses one part, and several parts even out the ranks' work. More would be decoded in
small batches, one after the other."""
_MOST_ITEMS = 256


def part_size(config: RunConfig, num_ranks: int) -> int:
    """Return the items of a part: generate.items_per_part, or so few that each rank has several parts."""
    given = config.generate.items_per_part
    if given is not None:
        return given
    return min(_MOST_ITEMS, -(-num_items(config) // (_PARTS_PER_RANK * num_ranks)))


def with_part_size(config: RunConfig, num_ranks: int) -> RunConfig:
    """Return the configuration with generate.items_per_part set, if its stage is made in parts."""
    if not in_parts(config.stage):
        return config
    size = part_size(config, num_ranks)
    return replace(config, generate=replace(config.generate, items_per_part=size))


def num_parts(config: RunConfig) -> int:
    """Return the number of parts; generate.items_per_part must be set."""
    return -(-num_items(config) // _settled_size(config))


def largest_part(config: RunConfig, num_ranks: int) -> int:
    """Return the items of the largest part, which one rank makes."""
    return min(part_size(config, num_ranks), num_items(config))


def part_items(config: RunConfig, number: int) -> range:
    """Return the task indices of part `number`."""
    first = config.generate.first_item if config.stage != "evaluate" else 0
    size = _settled_size(config)
    start = first + number * size
    return range(start, min(start + size, first + num_items(config)))


def idle_ranks(config: RunConfig, num_ranks: int) -> list[str]:
    """Return a sentence if some of `num_ranks` get no work in a stage or a rollout; generate.items_per_part
    must be set."""
    if is_rl(config.stage):
        # A prompt goes to one rank with all of its completions.
        prompts = config.rollout.num_prompts
        shares = -(-prompts // rollout_prompts(config, num_ranks))
        if shares >= num_ranks:
            return []
        return [
            f"{num_ranks - shares} of {num_ranks} ranks wait in each rollout: {prompts} prompts are dealt "
            f"whole, and make {shares} shares; set rollout.num_prompts to a multiple of the ranks, or take "
            "fewer ranks"
        ]
    if not in_parts(config.stage) or (parts := num_parts(config)) >= num_ranks:
        return []
    size, items = _settled_size(config), num_items(config)
    automatic = ", or begin the run without generate.items_per_part: it then follows from the ranks"
    return [
        f"{num_ranks - parts} of {num_ranks} ranks get nothing to do: {items} items in parts of {size} make "
        f"{parts}; take {parts} ranks or fewer{automatic if size > 1 else ''}"
    ]


def _settled_size(config: RunConfig) -> int:
    size = config.generate.items_per_part
    assert size is not None, "the submission settles it: with_part_size"
    return size


def prompts_together(config: RunConfig, num_ranks: int) -> int:
    """Return the most prompts that a rank of a sampling stage decodes together."""
    return max(prompts for prompts, _ in _decoded(config, num_ranks))


def rows_together(config: RunConfig, num_ranks: int) -> int:
    """Return the most completions that a rank of a sampling stage decodes together."""
    return max(prompts * completions for prompts, completions in _decoded(config, num_ranks))


def _decoded(config: RunConfig, num_ranks: int) -> list[tuple[int, int]]:
    """Return (prompts, completions of each) that a rank decodes together: of a part, or in stage rl of a
    rollout and of an evaluation, which it has at least at its beginning and end."""
    evaluated = config.evaluate.num_samples
    if is_rl(config.stage):
        return [
            (rollout_prompts(config, num_ranks), config.rollout.num_generations),
            (evaluation_prompts(config, num_ranks), evaluated),
        ]
    num_samples = config.generate.num_samples if config.stage == "generate" else evaluated
    return [(part_prompts(config, num_ranks), num_samples)]


def part_prompts(config: RunConfig, num_ranks: int) -> int:
    """Return the prompts of a part that its rank decodes together: prompts_per_batch, else all."""
    part = largest_part(config, num_ranks)
    return min(prompts_per_batch(config) or part, part)


def prompts_per_batch(config: RunConfig) -> int:
    """Return rollout.prompts_per_batch outside rollouts of stage rl; 0 for vLLM, which bounds its cache."""
    return 0 if config.rollout.engine == "vllm" else config.rollout.prompts_per_batch


def rollout_prompts(config: RunConfig, world_size: int) -> int:
    """Return the prompts that a rank of stage rl decodes together in a rollout."""
    share = -(-config.rollout.num_prompts // world_size)
    return min(config.rollout.prompts_per_batch or share, share)


def evaluation_prompts(config: RunConfig, world_size: int) -> int:
    """Return the prompts that a rank of stage rl decodes together in an evaluation: prompts_per_batch, else
    as many as keep the completions within a rollout's number, for which there is memory."""
    share = -(-num_items(config) // world_size)
    if config.rollout.engine == "vllm":
        return share
    rows = rollout_prompts(config, world_size) * config.rollout.num_generations
    return min(prompts_per_batch(config) or max(1, rows // config.evaluate.num_samples), share)


def num_items(config: RunConfig) -> int:
    """Return the items of a stage without optimizer steps, or of an evaluation of stage rl. The submission
    counts test files and writes each number into evaluate.sets."""
    if in_parts(config.stage) and config.stage != "evaluate":
        return config.generate.num_items
    evaluate = config.evaluate
    whole = evaluate.num_items or DEFAULT_NUM_HELD_OUT
    if evaluate.sets:
        return sum(int(part.get("num_items") or whole) for part in evaluate.sets.values())
    return whole
