"""Refuse stale rollouts without a correction, replays of other settings, and importance weights without use.

check_off_policy(config)               # of a new run of stage rl
notes = files_of_the_record(config)
"""

from dataclasses import replace
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_bytes
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import corrects_importance, updates_per_rollout

_OF_WEIGHTS = {"importance_level": "token", "importance_mask": "none"}
"""Settings of the importance weights, with the values that change nothing."""
# train/rollout/groups.py, format 2: token, log probability and flag; spans, rewards and terms; headers.
_TOKEN_BYTES, _ROW_BYTES, _FILE_BYTES = 9, 200, 8192


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


def files_of_the_record(config: RunConfig) -> list[str]:
    """Return a note on the files and bytes that <run>/trained/ will have; none if nothing is recorded."""
    rollout, staleness = config.rollout, config.rl.max_staleness
    if not staleness:
        return []
    num_rollouts = (config.train.num_steps - 1) // updates_per_rollout(config) + 1
    num_rows = rollout.num_prompts * rollout.num_generations
    most_tokens = rollout.max_prompt_length + rollout.max_completion_length
    row_bytes = _TOKEN_BYTES * most_tokens + _ROW_BYTES + 16 * staleness  # a span for each version
    size = format_bytes(num_rollouts * (num_rows * row_bytes + _FILE_BYTES))
    return [f"{2 * num_rollouts:,} files, at most {size}, of what it trains on will stay in trained/"]


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
