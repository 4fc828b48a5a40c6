"""Refuse rollout workers that could not sample for their trainer, and trainers that cannot have any.

check_workers(config)                      # of a new run of stage rl
config = with_trainers_settings(config, run_id)    # of a new run of stage rollout
"""

import os
from collections.abc import Collection
from dataclasses import replace

from r1hpc.base.errors import ConfigError, StateError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load, paths, plugins
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.fields import check_parents

_OF_TRAINER = ("model", "task", "reward", "rollout", "train")
"""Sections that a worker takes from its trainer: its completions are the trainer's own."""
_FITTING = {
    "rl.max_staleness": range(1, 65),
    "rl.max_resamples": (0,),
    "rl.replay": (None,),
    "rollout.engine": ("sampler",),
    "model.lora_rank": (0,),
    "train.precision": ("bf16", "fp32", "fp16"),
}
"""The values that rollout workers work with, the one to take first."""


def check_workers(config: RunConfig) -> None:
    """Refuse workers for a run that they cannot sample for yet; raise ConfigError."""
    if (patience_s := config.workers.patience_s) is None:
        _refuse_without_use(config, (), "a run of stage rl without workers.patience_s")
        return
    _refuse_without_use(config, ("patience_s", "silence_s"), "stage rl")
    for name, fitting in _FITTING.items():
        section, _, key = name.partition(".")
        if (value := getattr(getattr(config, section), key)) not in fitting:
            fix = "null" if fitting[0] is None else fitting[0]
            raise ConfigError(
                f"workers.patience_s={patience_s:g} asks for rollout workers, which do not work with "
                f"{name}={value}: take {name}={fix}, or leave workers.patience_s out"
            )


def with_trainers_settings(config: RunConfig, run_id: str) -> RunConfig:
    """Return a worker's settings with those of its trainer's run; raise an error if it could not sample."""
    _refuse_without_use(config, ("trainer", "idle_minutes"), "stage rollout, whose trainer sets it")
    if config.workers.trainer is None:
        raise ConfigError("a rollout worker needs workers.trainer=DIR, the folder of a run of stage rl")
    trainer = RunDir(config.workers.trainer)
    name = f"workers.trainer={trainer.path}"
    theirs = _settings_of(trainer, name, config.cluster.trust_shared_run_root)
    if trainer.finished.exists():
        raise UsageError(f"{name} has finished: there is nothing to sample for it")
    if (trainer.workers / run_id).exists():
        raise UsageError(
            f"{name} had a worker called {run_id}: --resume that one, or choose another --run-name"
        )
    default = RunConfig()
    for section in _OF_TRAINER:
        ours, standard, his = (vars(getattr(settings, section)) for settings in (config, default, theirs))
        for key, value in ours.items():
            if value not in (standard[key], his[key]):
                raise ConfigError(
                    f"{section}.{key}={value} is not this worker's to set: it takes its trainer's, "
                    f"{his[key]}. Remove it"
                )
    return replace(config, **{section: getattr(theirs, section) for section in _OF_TRAINER})


def _settings_of(trainer: RunDir, name: str, trust_shared: bool) -> RunConfig:
    """Return the settings of a run that takes groups of workers, if its code and questions are unchanged."""
    if not (os.access(trainer.config, os.R_OK) and os.access(trainer.path, os.W_OK | os.X_OK)):
        raise UsageError(f"{name} is no run that you can read and write: give the folder of your own run")
    try:
        check_parents(trainer.config, trust_shared)
        theirs = load.read(trainer.config)
        if theirs.stage != "rl" or theirs.workers.patience_s is None:
            raise UsageError(
                f"it takes no groups of workers (stage={theirs.stage}, workers.patience_s="
                f"{theirs.workers.patience_s}). Begin one with stage=rl, rl.max_staleness=2 and "
                "workers.patience_s=120"
            )
        for spec in paths.names_in(theirs):  # frozen with the worker, too
            plugins.find(spec)
        plugins.refuse_changes(paths.names_in(theirs), trainer.code)
        plugins.refuse_changed_files(trainer.code)
    except (ConfigError, StateError, UsageError) as error:
        raise UsageError(f"{name}: {error}") from None
    return theirs


def _refuse_without_use(config: RunConfig, used: Collection[str], where: str) -> None:
    """Raise ConfigError for a setting of section workers that this run would not read."""
    default = vars(type(config.workers)())
    for key, value in vars(config.workers).items():
        if key not in used and value != default[key]:
            raise ConfigError(f"workers.{key}={value} has no use in {where}: remove it")


def refuse_several_ranks(config: RunConfig, gpus_per_node: int) -> None:
    """Raise ConfigError unless the worker has one rank."""
    ranks = config.resources.nodes * (gpus_per_node or config.resources.ranks_per_node)
    if ranks != 1:
        raise ConfigError(
            f"a rollout worker has one rank, and this job has {ranks}: take resources.nodes=1 and "
            "resources.gpus_per_node=1 (without GPUs resources.ranks_per_node=1), and start several workers"
        )
