"""Refuse stale rollouts without a correction, replays of other settings, and importance weights without use.

check_off_policy(config)      # of a new run of stage rl
"""

from dataclasses import replace
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import corrects_importance, updates_per_rollout

_OF_WEIGHTS = {"importance_level": "token", "importance_mask": "none"}
"""Settings of the importance weights, with the values that change nothing."""


def check_off_policy(config: RunConfig) -> None:
    """Raise ConfigError for settings that need importance weights where there are none."""
    rl = config.rl
    if rl.max_staleness and rl.algorithm == "ppo":
        raise ConfigError(
            f"rl.max_staleness={rl.max_staleness} has no correction in PPO: its critic and advantages need "
            "the policy that sampled. Take rl.algorithm=grpo, or rl.max_staleness=0"
        )
    if rl.max_staleness and rl.algorithm == "grpo" and not corrects_importance(config):
        raise ConfigError(
            f"rl.max_staleness={rl.max_staleness} with rl.importance_sampling={rl.importance_sampling} would "
            "train on tokens of older policies as if the current one had sampled them. Take "
            "rl.importance_sampling=truncated, or rl.max_staleness=0"
        )
    if rl.replay is not None:
        _check_replay(config, RunDir(Path(rl.replay)))
    if rl.algorithm == "distill" or corrects_importance(config):
        return  # RlConfig.check_new refuses them with distillation
    for name, idle in _OF_WEIGHTS.items():
        if (value := getattr(rl, name)) != idle:
            raise ConfigError(
                f"rl.{name}={value} has no use: rl.importance_sampling={rl.importance_sampling} with "
                f"rollout.engine={config.rollout.engine} weighs no token. Add rl.importance_sampling="
                f"truncated, or take rl.{name}={idle}"
            )


def _check_replay(config: RunConfig, recorded: RunDir) -> None:
    """Refuse a run without the records that are needed, or with settings that would train otherwise."""
    last = (config.train.num_steps - 1) // updates_per_rollout(config)
    for rollout in range(last + 1):
        path = recorded.record(rollout)
        if not (path.is_file() and path.with_suffix(".npz").is_file()):
            raise ConfigError(
                f"rl.replay={recorded.path} has no record of rollout {rollout}; {last + 1} are needed. Name "
                "a run that had rl.max_staleness above 0 and has finished"
            )
    recorded_config = load.read(recorded.config)
    recorded_config = replace(recorded_config, rl=replace(recorded_config.rl, replay=config.rl.replay))
    for section in ("rl", "rollout", "reward", "train", "model", "task"):
        if getattr(recorded_config, section) != getattr(config, section):
            raise ConfigError(
                f"rl.replay={recorded.path} was recorded with other settings in section {section}, which "
                f"would train otherwise. Take those of {recorded.config}"
            )
