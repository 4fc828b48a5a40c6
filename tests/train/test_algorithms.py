"""GRPO and PPO against their formulas, computed the slow way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.config.load import assets
from r1hpc.config.schema.rl import RewardConfig, RlConfig, RolloutConfig
from r1hpc.config.schema.run import RunConfig, TrainConfig
from r1hpc.plan.topology.batch import updates_per_rollout
from r1hpc.train.rl.off_policy import corrected
from r1hpc.train.rl.ppo import gae, value_loss, whiten
from r1hpc.train.rl.update import (
    group_advantages,
    kl_k3,
    policy_terms,
    token_weights,
)


def test_advantages_are_the_distance_from_the_groups_mean_in_its_own_spread() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    scaled = group_advantages(rewards, scale=True)
    assert scaled[0, 0] == pytest.approx(0.75 / (math.sqrt(3) / 4), rel=1e-4)
    assert group_advantages(rewards, scale=False)[1].tolist() == [0.5, 0.5, -0.5, -0.5]


@given(reward=st.floats(-5, 5), members=st.integers(1, 16), scale=st.booleans())
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


def _kl_term_in_expectation(
    config: RlConfig, logits: torch.Tensor, reference: torch.Tensor, off_policy: bool
) -> torch.Tensor:
    """Return the gradient of the KL term's mean over samples of the old policy: each of the six outcomes is
    weighed by its probability, and advantages are 0."""
    old_logits = torch.tensor([[0.9, 0.1, -0.7, 0.4, 1.2, -0.3]], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    old = old_logits.log_softmax(-1) if off_policy else logprobs.detach()
    none, mask = torch.zeros_like(old), torch.ones_like(old, dtype=torch.bool)
    loss = policy_terms(logprobs, old, none, old.exp(), mask, config, reference).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
def test_the_corrected_kl_term_has_the_gradient_of_the_kl(off_policy: bool, ratio: str) -> None:
    """The gradient is that of KL(policy, reference); k3 alone has that of KL(reference, policy)."""
    logits = torch.tensor([[0.2, -0.5, 1.4, 0.6, -1.1, 0.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.3, -1.0, 0.8, 0.0, -0.4, 1.1]], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits)
    corrected = _kl_term_in_expectation(RlConfig(kl_coef=1.0, ratio=ratio), logits, reference, off_policy)
    assert float((corrected - reverse).abs().max()) < 1e-12
    alone = RlConfig(kl_coef=1.0, ratio=ratio, kl_gradient="value")
    value = _kl_term_in_expectation(alone, logits, reference, off_policy)
    assert float((value - reverse).abs().max()) > 0.05
    if not off_policy:
        assert float((value - forward).abs().max()) < 1e-12


def test_the_critics_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    loss = value_loss(
        torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]), 0.2
    )
    assert float(loss) == pytest.approx(0.5 * 0.8**2)


class _Case:
    """Random completions, and each algorithm's loss by its paper, token by token in Python."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = [1, 3, 7, 4]
        shape = (4, 7)
        self.mask = torch.tensor([[t < length for t in range(7)] for length in self.lengths])
        self.old = torch.from_numpy(rng.normal(-2, 1, shape))
        self.logprobs = (self.old + torch.from_numpy(rng.normal(0, 0.6, shape))).requires_grad_()
        self.advantages = torch.from_numpy(np.array([1.3, -0.7, 0.4, -2.0]))[:, None].expand(4, 7)

    def ratio(self, row: int, t: int) -> torch.Tensor:
        return torch.exp(self.logprobs[row, t] - self.old[row, t])

    def check(
        self,
        config: RlConfig,
        expected: torch.Tensor,
        importance: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        longest: int = 9,
    ) -> None:
        """Loss and gradient of ours against `expected`, to 1e-6.

        Args:
            longest: rollout.max_completion_length.
        """
        (slow,) = torch.autograd.grad(expected, self.logprobs)
        weights = token_weights(
            np.array(self.lengths, np.int32), np.ones(4, bool), config.loss_level, longest
        )
        per_token = torch.from_numpy(weights)[:, None] * self.mask
        ours = policy_terms(
            self.logprobs, self.old, self.advantages, per_token, self.mask, config, reference, importance
        ).loss
        (grad,) = torch.autograd.grad(ours, self.logprobs)
        assert slow.abs().max() > 1e-3
        assert float((ours - expected).detach().abs()) <= 1e-6
        assert float((grad - slow).abs().max()) <= 1e-6


def _clipped(case: _Case, row: int, t: int, low: float, high: float) -> torch.Tensor:
    """PPO's gain of one token (1707.06347 eq. 7)."""
    r, a = case.ratio(row, t), case.advantages[row, t]
    return torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


@pytest.mark.parametrize("kl_gradient", ["value", "corrected"])
@pytest.mark.parametrize("seed", range(3))
def test_grpo(seed: int, kl_gradient: str) -> None:
    """2402.03300 eq. 3 and 4: the mean over completions of the mean over tokens of the clipped gain less beta
    times the divergence from the reference, pi_ref / pi - log(pi_ref / pi) - 1; corrected, as in TRL 1.16 and
    2512.02556: that times pi / pi_old, which is differentiated and not clipped."""
    case, total, beta = _Case(seed), torch.zeros((), dtype=torch.float64), 0.04
    reference = case.old + torch.from_numpy(np.random.default_rng(seed).normal(0, 0.5, (4, 7)))
    for row, length in enumerate(case.lengths):
        of_row = torch.zeros((), dtype=torch.float64)
        for t in range(length):
            apart = torch.exp(reference[row, t]) / torch.exp(case.logprobs[row, t])
            k3 = apart - torch.log(apart) - 1
            k3 = k3 * case.ratio(row, t) if kl_gradient == "corrected" else k3
            of_row = of_row + _clipped(case, row, t, 0.2, 0.2) - beta * k3
        total = total + of_row / length
    config = RlConfig(
        loss_level="sequence", clip_low=0.2, clip_high=0.2, kl_coef=beta, kl_gradient=kl_gradient
    )
    case.check(config, -total / 4, reference=reference)


@pytest.mark.parametrize("seed", range(3))
def test_dr_grpo(seed: int) -> None:
    """2503.20783 eq. 3: the sum over tokens divided by a constant, the longest completion there may be."""
    case = _Case(seed)
    gains = [
        _clipped(case, row, t, 0.2, 0.2) for row, length in enumerate(case.lengths) for t in range(length)
    ]
    expected = -torch.stack(gains).sum() / (4 * 9)
    case.check(RlConfig(loss_level="constant", clip_high=0.2), expected, longest=9)


@pytest.mark.parametrize("seed", range(3))
def test_dapo(seed: int) -> None:
    """2503.14476 eq. 8: the mean over all tokens, with a higher upper clip."""
    case = _Case(seed)
    gains = [
        _clipped(case, row, t, 0.2, 0.5) for row, length in enumerate(case.lengths) for t in range(length)
    ]
    case.check(RlConfig(loss_level="token", clip_low=0.2, clip_high=0.5), -torch.stack(gains).mean())


@pytest.mark.parametrize("seed", range(3))
def test_gspo(seed: int) -> None:
    """2507.18071 eq. 5 and 7: mean of min(s A, clip(s) A) over sequences, s = (pi(y) / pi_old(y))^(1/|y|)."""
    case, total = _Case(seed), torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(case.lengths):
        likelihood = torch.ones((), dtype=torch.float64)
        for t in range(length):
            likelihood = likelihood * case.ratio(row, t)
        s, a = likelihood ** (1 / length), case.advantages[row, 0]
        total = total + torch.minimum(s * a, s.clamp(1 - 0.2, 1 + 0.3) * a)
    case.check(RlConfig(ratio="sequence", loss_level="sequence", clip_low=0.2, clip_high=0.3), -total / 4)


@pytest.mark.parametrize("seed", range(3))
def test_cispo(seed: int) -> None:
    """2506.13585 eq. 4: the clipped ratio, without a gradient, weighs A log pi; the mean over all tokens."""
    case, total = _Case(seed), torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(case.lengths):
        for t in range(length):
            weight = min(float(case.ratio(row, t).detach()), 1.28)
            total = total + weight * case.advantages[row, t] * case.logprobs[row, t]
    case.check(RlConfig(objective="cispo", clip_high=0.28), -total / sum(case.lengths))


@pytest.mark.parametrize("seed", range(3))
def test_dual_clip(seed: int) -> None:
    """1912.09729: for A < 0 max(min(r A, clip(r) A), c A), else PPO's."""
    case, total, bound = _Case(seed), torch.zeros((), dtype=torch.float64), 1.4
    reached = 0
    for row, length in enumerate(case.lengths):
        for t in range(length):
            r, a = case.ratio(row, t), case.advantages[row, t]
            gain = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
            if a < 0 and gain < bound * a:
                gain, reached = bound * a, reached + 1
            total = total + gain
    assert reached
    case.check(RlConfig(dual_clip=bound), -total / sum(case.lengths))


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("seed", range(3))
def test_truncated_importance_sampling(seed: int, objective: str) -> None:
    """Yao et al. 2025: min(pi_trainer_old / pi_sampler_old, C) times each token's clipped gain; C = 2."""
    case, total = _Case(seed), torch.zeros((), dtype=torch.float64)
    sampler = case.old + torch.from_numpy(np.random.default_rng(seed).normal(0, 0.8, (4, 7)))
    capped = 0
    for row, length in enumerate(case.lengths):
        for t in range(length):
            weight = math.exp(float(case.old[row, t])) / math.exp(float(sampler[row, t]))
            capped += weight > 2
            r, a = case.ratio(row, t), case.advantages[row, t]
            gain = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
            if objective == "cispo":
                gain = min(float(r.detach()), 1.2) * a * case.logprobs[row, t]
            total = total + min(weight, 2.0) * gain
    assert capped
    importance, _ = corrected(RlConfig(), case.logprobs, case.old, sampler, case.advantages, case.mask)
    assert (importance[~case.mask] == 0).all()
    case.check(RlConfig(objective=objective), -total / sum(case.lengths), importance)


def test_rloo() -> None:
    """2402.14740 section 2.2: R_i - 1/(k-1) sum over j != i of R_j."""
    rewards = np.random.default_rng(0).normal(size=(5, 7))
    slow = [[own - (sum(group) - own) / (len(group) - 1) for own in group] for group in rewards.tolist()]
    assert group_advantages(rewards, scale=False, leave_one_out=True) == pytest.approx(
        np.array(slow), abs=1e-12
    )
    assert (group_advantages(np.ones((2, 4)), False, leave_one_out=True) == 0).all()


@pytest.mark.parametrize(
    "path", sorted((assets("configs") / "rl").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_preset_names_settings_there_are(path: Path) -> None:
    preset = yaml.safe_load(path.read_text())
    RlConfig(**preset["rl"])
    RewardConfig(**preset["reward"])
    updates = updates_per_rollout(
        RunConfig(rollout=RolloutConfig(**preset["rollout"]), train=TrainConfig(**preset["train"]))
    )
    if path.stem in ("cispo", "dapo", "gspo"):
        assert updates > 1, "in a rollout's first update every ratio is 1, and no clip acts"
