"""Refuse rollout workers that could not sample for their trainer, and trainers that cannot have any.

check_workers(config)                      # of a new run of stage rl
config = with_trainers_settings(config, run_id)    # of a new run of stage rollout
"""

from dataclasses import replace

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load, paths, plugins
from r1hpc.config.schema.run import Precision, RunConfig

_OF_TRAINER = ("model", "task", "reward", "rollout", "train")
"""Sections that a worker takes from its trainer: its completions are the trainer's own."""


def check_workers(config: RunConfig) -> None:
    """Refuse workers for a run that they cannot sample for yet; raise ConfigError."""
    if config.workers.trainer is not None:
        raise ConfigError("workers.trainer is of stage rollout and has no use in stage rl: remove it")
    if config.workers.patience_s is None:
        return
    unfit = {
        "rl.max_staleness=0": config.rl.max_staleness == 0,
        "rl.max_resamples": config.rl.max_resamples > 0,
        "rl.replay": config.rl.replay is not None,
        "rollout.engine=vllm": config.rollout.engine == "vllm",
        "model.lora_rank": config.model.lora_rank > 0,
        "train.precision=fp8": config.train.precision is Precision.fp8,
    }
    if names := [name for name, is_asked in unfit.items() if is_asked]:
        raise ConfigError(
            f"workers.patience_s asks for rollout workers, which do not work with {names[0]}: "
            + ("set it to 1 or more" if names[0] == "rl.max_staleness=0" else "leave one of the two out")
        )


def with_trainers_settings(config: RunConfig, run_id: str) -> RunConfig:
    """Return a worker's settings with those of its trainer's run; raise UsageError if it has no such run."""
    if config.workers.trainer is None:
        raise ConfigError("a rollout worker needs workers.trainer=DIR, the folder of a run of stage rl")
    trainer = RunDir(config.workers.trainer)
    if not trainer.config.is_file():
        raise UsageError(f"workers.trainer={trainer.path} is no run: give the folder of a run of stage rl")
    theirs = load.read(trainer.config)
    if theirs.stage != "rl" or theirs.workers.patience_s is None:
        raise UsageError(
            f"workers.trainer={trainer.path} takes no groups of workers (stage {theirs.stage}, "
            "workers.patience_s unset): begin it with stage=rl, rl.max_staleness=2 and workers.patience_s=120"
        )
    if trainer.finished.exists():
        raise UsageError(f"workers.trainer={trainer.path} has finished: there is nothing to sample for it")
    if (trainer.workers / run_id).exists():
        raise UsageError(f"{trainer.path} had a worker called {run_id}: choose another --run-name")
    plugins.refuse_changes(paths.names_in(theirs), trainer.code)
    default = RunConfig()
    for name in _OF_TRAINER:
        if getattr(config, name) not in (getattr(default, name), getattr(theirs, name)):
            raise ConfigError(
                f"section {name} of a rollout worker is its trainer's, and this job sets another: remove it"
            )
    return replace(config, **{name: getattr(theirs, name) for name in _OF_TRAINER})


def refuse_several_ranks(config: RunConfig, gpus_per_node: int) -> None:
    """Raise ConfigError unless the worker has one rank."""
    ranks = config.resources.nodes * (gpus_per_node or config.resources.ranks_per_node)
    if ranks != 1:
        raise ConfigError(
            f"a rollout worker has one rank, and this job has {ranks}: take resources.nodes=1 and "
            "resources.gpus_per_node=1 (without GPUs resources.ranks_per_node=1), and start several workers"
        )
