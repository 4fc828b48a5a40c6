"""GRPO and PPO against their formulas, computed the slow way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.config.reasoning import RlConfig
from r1hpc.train.algorithms import (
    entropy_sum,
    gae,
    group_advantages,
    kl_k3,
    policy_terms,
    selected_logprobs,
    token_weights,
    value_loss,
    whiten,
)


def test_advantages_are_the_distance_from_the_groups_mean_in_its_own_spread() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    scaled = group_advantages(rewards, scale=True)
    assert scaled[0, 0] == pytest.approx(0.75 / (math.sqrt(3) / 4), rel=1e-4)
    assert group_advantages(rewards, scale=False)[1].tolist() == [0.5, 0.5, -0.5, -0.5]


@given(reward=st.floats(-5, 5), members=st.integers(1, 16), scale=st.booleans())
@settings(deadline=None)
def test_a_group_rewarded_alike_teaches_exactly_nothing(reward: float, members: int, scale: bool) -> None:
    assert (group_advantages(np.full((3, members), reward), scale) == 0).all()


def _slow_gae(reward: float, values: list[float], gamma: float, lam: float) -> list[float]:
    advantages = []
    for t in range(len(values)):
        total = 0.0
        for step in range(t, len(values)):
            last = step == len(values) - 1
            after = 0.0 if last else values[step + 1]
            delta = (reward if last else 0.0) + gamma * after - values[step]
            total += (gamma * lam) ** (step - t) * delta
        advantages.append(total)
    return advantages


@given(
    rows=st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=6), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
@settings(deadline=None)
def test_gae_is_the_discounted_sum_of_errors(rows: list[list[float]], gamma: float, lam: float) -> None:
    longest = max(map(len, rows))
    values = np.array([row + [9.0] * (longest - len(row)) for row in rows])
    lengths = np.array([len(row) for row in rows], np.int32)
    rewards = np.arange(1.0, len(rows) + 1)
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    for row, reward, ours, back in zip(rows, rewards, advantages, returns, strict=True):
        slow = _slow_gae(float(reward), row, gamma, lam)
        assert ours[: len(row)] == pytest.approx(slow, abs=1e-9)
        assert back[: len(row)] == pytest.approx([a + v for a, v in zip(slow, row, strict=True)], abs=1e-9)
        assert (ours[len(row) :] == 0).all()
        assert (back[len(row) :] == 0).all()


def test_whitened_advantages_have_mean_0_and_deviation_1_where_there_are_tokens() -> None:
    mask = np.array([[True, True, False], [True, False, False]])
    white = whiten(np.array([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), mask)
    assert white[mask].mean() == pytest.approx(0)
    assert white[mask].std() == pytest.approx(1)
    assert (white[~mask] == 0).all()


@pytest.mark.parametrize(
    ("level", "expected"),
    [("token", [1 / 6, 1 / 6, 0]), ("sequence", [1 / 4, 1 / 8, 0]), ("constant", [1 / 20, 1 / 20, 0])],
)
def test_the_three_ways_to_weigh_a_token(level: str, expected: list[float]) -> None:
    lengths, counts = np.array([2, 4, 7], np.int32), np.array([True, True, False])
    assert token_weights(lengths, counts, level, 10).tolist() == pytest.approx(expected)


def test_the_clip_stops_the_gain_and_not_the_loss() -> None:
    config = RlConfig(clip_low=0.2, clip_high=0.28)
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    ones, mask = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    terms = policy_terms(ratios.log(), torch.zeros(1, 4), advantages, ones, mask, config)
    # min(1.5, 1.28), min(-1.5, -1.28), min(0.5, 0.8), min(-0.5, -0.8)
    assert float(terms.loss) == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8))
    assert int(terms.clipped) == 2


def test_padding_pulls_at_nothing() -> None:
    config = RlConfig(kl_coef=0.1)
    logprobs = torch.tensor([[-1.0, 50.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    weights = torch.tensor([[0.5, 0.0]])
    reference = torch.tensor([[-2.0, -90.0]])
    terms = policy_terms(
        logprobs, torch.tensor([[-1.0, -50.0]]), torch.ones(1, 2), weights, mask, config, reference
    )
    terms.loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert torch.isfinite(terms.loss)
    assert float(logprobs.grad[0, 1]) == 0.0
    assert float(terms.kl) == pytest.approx(math.exp(-1) + 1 - 1)


def test_k3_is_unbiased_and_never_negative() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(5).log_softmax(-1), torch.randn(5).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    estimate = (policy.exp() * kl_k3(policy, reference)).sum()  # its expectation over the policy's samples
    assert float(estimate) == pytest.approx(float(exact), rel=1e-5)
    assert (kl_k3(policy, reference) >= 0).all()


def test_the_critics_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    loss = value_loss(
        torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]), 0.2
    )
    assert float(loss) == pytest.approx(0.5 * 0.8**2)


def test_log_probabilities_and_entropy_at_a_temperature() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 7)
    tokens = torch.randint(7, (2, 3))
    expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(selected_logprobs(logits, tokens, 0.7), expected)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    probabilities = (logits / 0.7).softmax(-1)
    slow = -(probabilities * probabilities.log()).sum(-1)[mask].sum()
    assert float(entropy_sum(logits, mask, 0.7)) == pytest.approx(float(slow), rel=1e-5)
