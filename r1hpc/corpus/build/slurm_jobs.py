"""Build a dataset on Slurm: each stage of its recipe is an array of jobs, each job a share of its units.

    order = DatasetOrder(recipe, out, shares=8, overrides=("resources.partition=cpu",))
    jobs = submit_dataset(order)     # {"clean": "12", "tokenizer": "13", "tokens": "14", "publish": "15"}

A stage starts when the previous one has succeeded. Units are named by all they depend on, so a preempted
job starts again with the missing units, a failed build continues when submitted again, and the result equals
that of one process. If inputs, code or libraries changed while a job waited, it fails with an error, since
each job of an array would make the earlier stages anew. Scripts and logs lie in the work folder, which is
removed once the dataset exists.
"""

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import write_atomic
from r1hpc.config.load import merge_layers
from r1hpc.config.schema.run import RunConfig
from r1hpc.corpus.build.stages import plan_stages
from r1hpc.corpus.engine.work_dir import destination_of, work_folder
from r1hpc.corpus.recipe import load_recipe
from r1hpc.corpus.sources.read import list_spans
from r1hpc.slurm import fields
from r1hpc.slurm.client import SlurmError, call
from r1hpc.slurm.queue import after_all_ok, jobs_by_folder
from r1hpc.slurm.sbatch import sbatch
from r1hpc.slurm.script import asked_options, directives, interpreter, site_lines

JOBS = "jobs"
PUBLISH = "publish"

_SCRIPT = """\
#!/bin/bash
{directives}
# Written by `python -m r1hpc.shard build --engine slurm`.
{site}
export PYTHONSAFEPATH=1 PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"
exec {command} --workers "${{SLURM_CPUS_PER_TASK:-1}}"{share}
"""


@dataclass(frozen=True)
class DatasetOrder:
    """The settings of a build on Slurm."""

    recipe: Path
    out: Path
    shares: int = 4
    """Jobs per stage of many parts, at most one per part."""
    overrides: tuple[str, ...] = ()
    """Settings of `resources`, from the flags of sbatch."""
    cluster: str | None = None
    check_inputs: bool = False

    def __post_init__(self) -> None:
        if self.shares < 1:
            raise UsageError(f"--jobs must be at least 1, not {self.shares}")


def submit_dataset(order: DatasetOrder) -> dict[str, str]:
    """Submit the jobs of a build, each stage after the previous one; return their ids by stage.

    Raise UsageError if the recipe, an input, or a field of the jobs cannot be used; StateError if jobs of the
    same build are pending or running; SlurmError if sbatch refused, after cancelling the earlier jobs.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on PATH: run this on a login node, or take --engine local")
    config = merge_layers([], order.overrides, order.cluster)
    fields.check_cluster(config.cluster)
    fields.check_resources(config.resources)
    folder = work_folder(destination_of(order.out)) / JOBS
    fields.check_path(folder, "the folder of --out")
    at_work = jobs_by_folder().get(folder)
    if at_work:
        raise StateError(
            f"{order.out} is being built by job {', '.join(at_work)}: see `shard status`, or scancel"
        )
    scripts = list(_scripts(order, config, folder))  # check all before submitting the first
    folder.mkdir(parents=True, exist_ok=True)
    submitted: dict[str, str] = {}
    try:
        for name, options, text in scripts:
            path = folder / f"{name}.sh"
            write_atomic(path, text, mode=0o700)
            options = options | after_all_ok(list(submitted.values())[-1:], config.resources.dependency)
            flags = [f"--{key}={value}" for key, value in options.items()]
            submitted[name] = sbatch(path, folder, flags)
    except BaseException:  # an interrupt too: without its last job the build would never be published
        if submitted:
            with contextlib.suppress(SlurmError):  # report the first error
                call(["scancel", *submitted.values()])
        raise
    return submitted


def _scripts(
    order: DatasetOrder, config: RunConfig, folder: Path
) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield for each job array its name, its options for dependency and size, and its script."""
    recipe = load_recipe(order.recipe)
    stages = plan_stages(recipe, list_spans(recipe, is_new=True))
    dependency = {"dependency": config.resources.dependency} if config.resources.dependency else {}
    command = [*interpreter(config.cluster), "-m", "r1hpc.shard", "build"]
    command += [str(order.recipe.absolute()), "--out", str(destination_of(order.out))]
    # The tokenizer's job makes the one unit of dedup.
    for name in (*(stage for stage in stages if stage != "dedup"), PUBLISH):
        count = min(order.shares, stages.get(name, 1))
        share = ""
        if name != PUBLISH:
            share = f' --stage {name} --share "${{SLURM_ARRAY_TASK_ID:-0}}/{count}"'
        array = {"array": f"0-{count - 1}"} if count > 1 else {}
        share += f" --after-others --recipe-hash {recipe.hash}{' --check-inputs' * order.check_inputs}"
        # One task, some cores, requeued by Slurm after a preemption.
        chosen: dict[str, str | int | None] = {
            "job-name": f"{folder.parent.name.removeprefix('.staging-')[:48]}-{name}",
            "ntasks": 1,
            **asked_options(config),
            "requeue": "",
            "open-mode": "append",
            "chdir": str(folder),
            "output": str(folder / f"{name}-%A_%a.out"),
        }
        script = _SCRIPT.format(
            directives=directives({key: str(value) for key, value in chosen.items() if value is not None}),
            site=site_lines(config.cluster.setup, config.cluster.environment),
            code=shlex.quote(str(Path(__file__).parents[2])),
            command=shlex.join(command),
            share=share,
        )
        yield name, {**array, **dependency}, script
