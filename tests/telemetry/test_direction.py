"""The direction of a number is taken from its name only if that leaves no doubt."""

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.telemetry.records.direction import direction, lower_is_better


@pytest.mark.parametrize(
    "name",
    ["loss", "eval_loss", "train/loss_epoch", "perplexity", "val.wer", "mean_squared_error", "step_time_s"],
)
def test_lower_is_better(name: str) -> None:
    assert lower_is_better(name) is True


@pytest.mark.parametrize(
    "name", ["accuracy", "eval_gsm8k_accuracy", "reward", "pass@1", "gsm8k pass@8", "test F1", "greedy"]
)
def test_higher_is_better(name: str) -> None:
    assert lower_is_better(name) is False


@pytest.mark.parametrize(
    "name",
    [
        *("val", "score", "lr", "kl", "learning_rate", "grad_norm", "loss_scale", "reward_std", "", "@"),
        *("neg_mean_squared_error", "reward_loss", "loss_delta", "rewards/rejected", "tokens", "1"),
    ],
)
def test_a_doubtful_name_is_refused_with_both_flags(name: str) -> None:
    with pytest.raises(UsageError, match="Add --lower or --higher"):
        direction(name, None)
    assert direction(name, True) is True
    assert direction(name, False) is False
