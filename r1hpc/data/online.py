"""Weights of the sources from their losses: Online Data Mixing (Albalak et al. 2023, arXiv 2312.02406).

    odm = OnlineWeights(prior=(0.3, 0.4, 0.3), smoothing=0.9)
    odm.observe(losses, tokens)         # of a step: sums over the tokens of each source
    weights = odm.turn()                # where weights may change
    odm.state(), odm.restore(state)     # for a checkpoint

Exp3 with the sources as arms and a source's mean loss as its reward: what the model predicts badly it sees
more of. At turn t, with K sources, exploration e_t = min(1/K, sqrt(ln K / (K t))) and reward R_i, a moving
average over the turns,

    pi_i = (1 - K e_t) p_i exp(e_(t-1) R_i) / sum_j p_j exp(e_(t-1) R_j) + K e_t p_i

where p are the weights without it; uniform ones make it the paper's. The paper divides a loss by pi_i, since
it draws one source at a time and by chance; here every batch holds each source in its share, so the mean loss
is that estimate without its variance. Noise that cannot be learnt is a hard source too, and gains weight.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1hpc.data.mixture import divide

_STEPS_OF_WEIGHT = 10_000
"""Weights are rounded to these. Losses differ in their last bits on another number of ranks: so they come to
the same weights all the same, but for rare cases."""


class OnlineWeights:
    """What is known of the sources' losses, and the weights that follow."""

    def __init__(self, prior: Sequence[float], smoothing: float) -> None:
        """`prior` are the weights that would hold without it; a source of weight 0 stays out."""
        self._prior = np.array(prior) / math.fsum(prior)
        self._smoothing = smoothing
        self._turns = 0
        self._rewards = np.zeros(len(prior))
        self._losses = np.zeros(len(prior))
        self._tokens = np.zeros(len(prior))

    def observe(self, losses: Sequence[float], tokens: Sequence[float]) -> None:
        """Add what a step saw: loss (nats) summed over the tokens of each source, and how many those were."""
        self._losses += losses
        self._tokens += tokens

    def turn(self) -> tuple[float, ...]:
        """The weights from here on, summing to 1. A source that was not seen keeps its reward."""
        seen = self._tokens > 0
        means = self._losses[seen] / self._tokens[seen]
        kept = self._smoothing * self._rewards[seen]
        self._rewards[seen] = kept + (1 - self._smoothing) * means
        self._losses, self._tokens = np.zeros_like(self._losses), np.zeros_like(self._tokens)
        before, now = self._exploration(self._turns), self._exploration(self._turns + 1)
        self._turns += 1
        raised = self._prior * np.exp(before * (self._rewards - self._rewards.max()))
        explored = len(raised) * now
        weights = (1 - explored) * raised / raised.sum() + explored * self._prior
        rounded = divide(_STEPS_OF_WEIGHT, weights.tolist())
        # None rests that should not: a source that was to fill a mixture's end would be missed there.
        parts = [max(part, 1) if prior else 0 for part, prior in zip(rounded, self._prior, strict=True)]
        return tuple(part / sum(parts) for part in parts)

    def state(self) -> dict[str, Any]:
        """As JSON holds it; `restore` goes on from it to the bit."""
        arrays = {"rewards": self._rewards, "losses": self._losses, "tokens": self._tokens}
        return {"turns": self._turns} | {name: array.tolist() for name, array in arrays.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._turns = int(state["turns"])
        self._rewards, self._losses, self._tokens = (
            np.array(state[name], np.float64) for name in ("rewards", "losses", "tokens")
        )

    def _exploration(self, turn: int) -> float:
        """e_t: the least share of a source, over K."""
        count = len(self._prior)
        return min(1 / count, math.sqrt(math.log(count) / (count * turn))) if turn else 1 / count
