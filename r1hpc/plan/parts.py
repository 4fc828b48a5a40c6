"""How the stages without optimizer steps (traces, generate, evaluate) are cut into parts."""

from r1hpc.config.schema import RunConfig

DEFAULT_NUM_HELD_OUT = 256
"""Where evaluate.num_items is not given; of a test file all are asked."""


def num_parts(config: RunConfig) -> int:
    """Parts of at most generate.items_per_part items."""
    return -(-num_items(config) // config.generate.items_per_part)


def part_items(config: RunConfig, number: int) -> range:
    """Task indices of part `number`."""
    first = config.generate.first_item if config.stage != "evaluate" else 0
    size = config.generate.items_per_part
    start = first + number * size
    return range(start, min(start + size, first + num_items(config)))


def rollout_prompts(config: RunConfig, world_size: int) -> int:
    """Prompts that a rank of stage rl decodes together in a rollout."""
    share = -(-config.rollout.num_prompts // world_size)
    return min(config.rollout.prompts_per_batch or share, share)


def evaluation_prompts(config: RunConfig, world_size: int) -> int:
    """Prompts that a rank of stage rl decodes together in an evaluation: rollout.prompts_per_batch, else so
    many that there are no more completions at once than in a rollout, for which there is memory."""
    share = -(-num_items(config) // world_size)
    if config.rollout.engine == "vllm":  # bounds its cache itself
        return min(config.rollout.prompts_per_batch or share, share)
    rows = rollout_prompts(config, world_size) * config.rollout.num_generations
    return min(config.rollout.prompts_per_batch or max(1, rows // config.evaluate.num_samples), share)


def num_items(config: RunConfig) -> int:
    """Items of a stage without optimizer steps, or of an evaluation of stage rl.

    Test files are counted by the submission, which writes how many each has into evaluate.sets.
    """
    if config.stage in ("traces", "generate"):
        return config.generate.num_items
    evaluate = config.evaluate
    whole = evaluate.num_items or DEFAULT_NUM_HELD_OUT
    if evaluate.sets:
        return sum(int(part.get("num_items") or whole) for part in evaluate.sets.values())
    return whole
