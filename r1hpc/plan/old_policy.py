"""Which policy the ratios of an update are taken to, and whether the trainer works it out by itself.

corrects_importance(config)      # the sampler's log-probabilities are not taken for the trainer's
works_out_old_policy(config)     # a pass over each rollout before its updates
"""

from r1hpc.config.schema import Precision, RunConfig
from r1hpc.plan.batch import updates_per_rollout


def corrects_importance(config: RunConfig) -> bool:
    """Whether truncated importance sampling stands between sampler and trainer (rl.importance_sampling)."""
    asked, distills = config.rl.importance_sampling, config.rl.algorithm == "distill"
    return asked == "truncated" or (asked == "auto" and config.rollout.engine == "vllm" and not distills)


def works_out_old_policy(config: RunConfig) -> bool:
    """Whether the trainer works out what the policy that sampled thought of a rollout.

    With one update a rollout that policy is the one that is trained. With several the sampler's
    log-probabilities do, but where importance is corrected, and for GSPO in half precision: it clips the mean
    over a sequence to some 1e-4, and the sampler's bf16 is 1e-2 a token away.
    """
    if config.rl.algorithm == "distill" or updates_per_rollout(config) == 1:
        return False
    sees_rounding = config.rl.ratio == "sequence" and config.train.precision is not Precision.fp32
    return corrects_importance(config) or sees_rounding
