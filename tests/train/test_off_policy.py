"""Weights and masks for tokens of another policy: against TRL's own lines, and the papers' formulas."""

import inspect
import math
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r1hpc.config.schema.rl import RlConfig
from r1hpc.train.rl.off_policy import corrected, importance_ratio, within_trust

LENGTHS = (1, 3, 7, 4)
MASK = torch.tensor([[t < length for t in range(7)] for length in LENGTHS])


def logprobs(seed: int) -> torch.Tensor:
    """Log-probabilities in float64, some near 0 and some of tokens that were unlikely."""
    return torch.from_numpy(-np.random.default_rng(seed).exponential(1.2, (4, 7)))


ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -2.0], dtype=torch.float64)[:, None].expand(4, 7)


def of_trl(
    mode: str, old: torch.Tensor, sampled: torch.Tensor, low: float | None, high: float
) -> torch.Tensor:
    """TRL's weights: its own lines out of GRPOTrainer, which it has in no function."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    source = inspect.getsource(trainer._generate_and_score_completions)
    start = source.index("per_token_logps_diff = (old_per_token_logps")
    end = source.index("# Compute the per-token log probabilities for the reference model")
    lines = textwrap.dedent(" " * 16 + source[start:end])
    names = {
        f"vllm_importance_sampling_{name}": value
        for name, value in (("mode", mode), ("clip_min", low), ("clip_max", high))
    }
    scope: dict[str, Any] = {
        "torch": torch,
        "math": math,
        "self": SimpleNamespace(**names),
        "mask": MASK.double(),
        "old_per_token_logps": old,
        "sampling_per_token_logps": sampled,
    }
    exec(lines, scope)
    return torch.where(MASK, scope["vllm_importance_sampling_ratio"], 0.0)


@pytest.mark.slow  # importing TRL
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("mask", "mode"), [("none", "token_truncate"), ("ratio", "token_mask")])
def test_the_weights_of_tokens_are_trls(mask: str, mode: str, seed: int) -> None:
    old, sampled = logprobs(seed), logprobs(seed + 10)
    rl = RlConfig(importance_mask=mask, importance_low=0.5, importance_cap=2.0)
    ours, is_left_out = corrected(rl, old, old, sampled, ADVANTAGES, MASK)
    theirs = of_trl(mode, old, sampled, 0.5 if mask == "ratio" else None, 2.0)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    assert bool(is_left_out.any()) is (mask == "ratio")


@pytest.mark.parametrize("mask", ["none", "ratio"])
def test_a_completions_weight_is_the_geometric_mean_of_its_tokens(mask: str) -> None:
    """GSPO's ratio, arXiv 2507.18071 eq. 7, of pi_old to mu; IcePop's M(k) of it: k within [low, high]."""
    old, sampled = logprobs(1), logprobs(11)
    rl = RlConfig(importance_level="sequence", importance_mask=mask, importance_low=0.8, importance_cap=1.2)
    weights, is_left_out = corrected(rl, old, old, sampled, ADVANTAGES, MASK)
    left_out = 0
    for row, length in enumerate(LENGTHS):
        product = math.prod(
            math.exp(float(old[row, t])) / math.exp(float(sampled[row, t])) for t in range(length)
        )
        ratio = product ** (1 / length)
        expected = min(ratio, 1.2)
        if mask == "ratio" and not 0.8 <= ratio <= 1.2:
            expected, left_out = 0.0, left_out + length
        assert weights[row, :length].tolist() == pytest.approx([expected] * length, rel=1e-12)
        assert (weights[row, length:] == 0).all()
    assert int(is_left_out.sum()) == left_out
    assert bool(left_out) is (mask == "ratio")


@pytest.mark.parametrize("seed", range(3))
def test_trust_leaves_out_what_has_moved_too_far_along_its_advantage(seed: int) -> None:
    """DPPO, arXiv 2602.04879, Binary-TV: for A > 0 not where pi - mu > delta, else not where mu - pi > delta.
    pi is the policy now; the weight itself is of the policy before the first update."""
    policy, old, sampled = logprobs(seed), logprobs(seed + 5), logprobs(seed + 10)
    rl = RlConfig(importance_mask="trust", importance_trust=0.2)
    (weights, is_left_out), seen = corrected(rl, policy, old, sampled, ADVANTAGES, MASK), set()
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            moved = math.exp(float(policy[row, t])) - math.exp(float(sampled[row, t]))
            is_out = moved > 0.2 if ADVANTAGES[row, t] > 0 else -moved > 0.2
            weight = min(math.exp(float(old[row, t])) / math.exp(float(sampled[row, t])), 2.0)
            assert bool(is_left_out[row, t]) is is_out
            assert float(weights[row, t]) == pytest.approx(0.0 if is_out else weight, rel=1e-12)
            seen.add((is_out, float(ADVANTAGES[row, t]) > 0))
    assert len(seen) == 4, "a case never came up"
    assert not (is_left_out & ~MASK).any()


def test_no_gradient_goes_through_weights_or_masks() -> None:
    policy = logprobs(0).requires_grad_()
    assert not importance_ratio(policy, logprobs(1), MASK, "sequence").requires_grad
    assert not within_trust(policy, logprobs(1), ADVANTAGES, MASK, 0.2).requires_grad
    rl = RlConfig(importance_mask="trust")
    assert not corrected(rl, policy, policy, logprobs(1), ADVANTAGES, MASK)[0].requires_grad


def test_what_stands_on_padding_does_not_matter() -> None:
    wild = torch.where(MASK, logprobs(2), 1e4)
    weights, _ = corrected(RlConfig(importance_mask="trust"), wild, wild, -wild, ADVANTAGES, MASK)
    assert weights.isfinite().all()
