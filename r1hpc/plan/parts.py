"""How the stages without optimizer steps (traces, generate, evaluate) are cut into parts."""

from r1hpc.config.schema import RunConfig


def num_parts(config: RunConfig) -> int:
    """Parts of at most generate.items_per_part items."""
    return -(-_num_items(config) // config.generate.items_per_part)


def part_items(config: RunConfig, number: int) -> range:
    """Task indices of part `number`."""
    first = config.generate.first_item if config.stage != "evaluate" else 0
    size = config.generate.items_per_part
    start = first + number * size
    return range(start, min(start + size, first + _num_items(config)))


def _num_items(config: RunConfig) -> int:
    return config.evaluate.num_items if config.stage == "evaluate" else config.generate.num_items
