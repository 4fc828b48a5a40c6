"""What an update adds up over its tokens, and where: on the device, read once at its end.

tally.add(entropy=entropies.sum())
sums = Sums(*group.sum(tally.numbers()))
"""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sums:
    """Over the tokens of one update."""

    tokens: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    """To the reference; of distillation the divergence to the teacher."""
    difference: float = 0.0
    """|log-probability by the trainer - by the sampler|; only while the policy is the one that sampled."""
    value_loss: float = 0.0
    importance: float = 0.0
    """Weights of truncated importance sampling, as they were used; like the next two."""
    importance_squared: float = 0.0
    importance_capped: float = 0.0
    """Tokens whose weight was cut to rl.importance_cap."""

    def per_token(self, total: float) -> float | None:
        """A sum as a mean over the tokens that were trained on; None where there was none."""
        return total / self.tokens if self.tokens else None

    def effective_share(self) -> float | None:
        """The effective sample size (Kish) of the importance weights over the number of tokens: 1 where all
        weigh alike; None where none were taken."""
        if not self.importance_squared:
            return None
        return self.importance**2 / (self.tokens * self.importance_squared)


class Tally:
    """Adds up this rank's Sums where its tensors lie, in float64: nobody waits for a GPU within the step."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, **parts: torch.Tensor) -> None:
        """Scalars, by the names of Sums."""
        for name, part in parts.items():
            part = part.detach().double()
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def numbers(self) -> list[float]:
        """In the order in which `Sums(*numbers)` takes them, to be added up over the ranks."""
        if not self._sums:
            return [0.0 for _ in fields(Sums)]
        known = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        return [known.get(each.name, 0.0) for each in fields(Sums)]
