"""Top-k, min-p and top-p keep what their definitions say, and sampling never leaves it."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from r1hpc.train.rollout.torch_engine import Cut, choose, streams, truncated

_CUTS = [
    Cut(top_k=1),
    Cut(top_k=5),
    Cut(min_p=0.1),
    Cut(top_p=0.95),
    Cut(top_p=0.3),
    Cut(0.8, 7, 0.02),
    Cut(1.0, 400, 0.0),
]


def _expected(logits: npt.NDArray[np.float64], cut: Cut) -> npt.NDArray[np.float64]:
    """Token by token, from the definitions."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = sorted(range(len(logits)), key=lambda token: (-probabilities[token], token))
    if cut.top_k:
        order = order[: cut.top_k]
    order = [token for token in order if probabilities[token] >= cut.min_p * probabilities[order[0]]]
    whole, reached, kept = sum(probabilities[token] for token in order), 0.0, []
    for token in order:
        if reached / whole >= cut.top_p:
            break
        kept.append(token)
        reached += probabilities[token]
    found = np.zeros(len(logits))
    found[kept] = probabilities[kept] / reached
    return found


@pytest.mark.parametrize("cut", _CUTS)
def test_the_distribution_is_that_of_the_definition(cut: Cut) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (50, 300))).float()
    found = truncated(logits.log_softmax(-1), cut).double().exp().numpy()
    expected = np.stack([_expected(row, cut) for row in logits.double().numpy()])
    assert ((found > 0) == (expected > 0)).all()
    assert np.abs(found - expected).max() < 1e-6


def test_samples_stay_inside_and_follow_it() -> None:
    cut, num = Cut(top_p=0.7), 20000
    logits = torch.linspace(0, 3, 10)[None]
    expected = _expected(logits[0].double().numpy(), cut)
    tokens, logprobs = choose(logits.expand(num, -1), 1.0, streams(3, range(num), 1), 5, cut)
    shares = np.bincount(tokens.numpy(), minlength=10) / num
    assert (shares[expected == 0] == 0).all()
    assert np.abs(shares - expected).max() < 0.02
    assert np.abs(np.exp(logprobs.double().numpy()) - expected[tokens.numpy()]).max() < 1e-6


def test_of_equally_likely_tokens_the_first_are_kept() -> None:
    kept = truncated(torch.zeros(1, 8).log_softmax(-1), Cut(top_k=3)).exp()[0]
    assert kept.tolist() == pytest.approx([1 / 3] * 3 + [0.0] * 5)
