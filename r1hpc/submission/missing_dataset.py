"""A dataset that is not there yet: whether the run's own job may build it, or whether GPUs would wait for it.

refuse_long_build(run, config)       # of a run that will hold GPUs
"""

from r1hpc.attempt.dataset import folder_of_recipe
from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import RunDir
from r1hpc.base.units import format_bytes
from r1hpc.config.schema import RunConfig
from r1hpc.data.recipe import find_recipe, load_recipe

_MOST_BYTES = 64 << 20
"""Of input: built in about a minute on one core, less than the start of a large model takes."""


def refuse_long_build(run: RunDir, config: RunConfig) -> None:
    """Refuse a run that would build a large dataset when it begins, with its GPUs idle.

    One of data.traces is not refused, however large: no command makes that dataset beforehand.

    Raises:
        UsageError: says how to build it first.
    """
    data = config.data
    if config.stage not in ("pretrain", "sft") or data.path or data.traces or data.recipe is None:
        return
    path = find_recipe(data.recipe)
    folder = folder_of_recipe(run, path)
    if folder.exists():
        return
    from r1hpc.data.sources import list_spans  # numpy: a tenth of a second that other submissions are spared

    num_bytes = sum(span.num_bytes for span in list_spans(load_recipe(path)))
    if num_bytes > _MOST_BYTES:
        raise UsageError(
            f"the dataset of recipe {data.recipe} is not built yet, and the job's GPUs would wait while it "
            f"is made of {format_bytes(num_bytes)}. Build it first, then submit again:\n"
            f"  python -m r1hpc.shard build {data.recipe} --out {folder} --engine slurm"
        )
