"""Refuse stale rollouts without a correction, and settings of the importance weights that correct nothing.

check_off_policy(config)      # of a new run of stage rl
"""

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import corrects_importance

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
    if rl.algorithm == "distill" or corrects_importance(config):
        return  # RlConfig.check_new refuses them with distillation
    for name, idle in _OF_WEIGHTS.items():
        if (value := getattr(rl, name)) != idle:
            raise ConfigError(
                f"rl.{name}={value} has no use: rl.importance_sampling={rl.importance_sampling} with "
                f"rollout.engine={config.rollout.engine} weighs no token. Add rl.importance_sampling="
                f"truncated, or take rl.{name}={idle}"
            )
