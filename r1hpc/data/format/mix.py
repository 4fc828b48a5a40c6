"""Define block `mix` of recipes and manifests: the shares of the sources, by which read/mixture.py draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, one_of
from r1hpc.config.schema.sections import MixConfig


@dataclass(frozen=True)
class MixRecipe:
    """The sampling weights of the sources (see data/read/mixture.py)."""

    by: str = "tokens"
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source by name; fractions that sum to 1 or 100, or whole numbers. None: its size."""
    max_epochs: float | None = None
    """A source seen so often is left out from then on."""
    temperature: float = 1.0
    """Shares are raised to 1/temperature: above 1 small sources gain."""

    def __post_init__(self) -> None:
        one_of("mix.by", self.by, ("tokens", "documents"))
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"mix.temperature must be a positive number, not {self.temperature}")
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise UsageError(f"mix.max_epochs must be a positive number, not {self.max_epochs}")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(f"mix.weights.{name} must be a positive number, not {weight}")

    def check_sum(self) -> None:
        """Raise UsageError for fractions that sum neither to 1 nor to 100 (within 1 %): one is mistyped.

        Only for new builds: weights of an existing dataset stay as they are.
        """
        weights = self.weights.values()
        total = math.fsum(weights)
        is_near = any(math.isclose(total, whole, rel_tol=0.0101) for whole in (1, 100))
        if is_near or all(float(weight).is_integer() for weight in weights):
            return
        shares = ", ".join(f"{name} {weight / total:.1%}" for name, weight in self.weights.items())
        raise UsageError(
            f"mix.weights sum to {total:g}, not to 1 or 100: the shares would be {shares}. Correct them, or "
            "give whole numbers, which are parts of their sum"
        )


def check_weighted(where: str, weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise UsageError unless the weights name exactly the sources."""
    for name in weights:
        if name not in names:
            raise UsageError(f"{where} names no source {name!r}{nearest(name, names)}")
    if missing := [name for name in names if name not in weights]:
        raise UsageError(f"{where} says nothing of source {missing[0]!r}; give each source its share")


def check_schedule(mix: MixConfig, names: Sequence[str]) -> None:
    """Raise UsageError unless each change of weights of a run names exactly the sources of its dataset."""
    for number, entry in enumerate(mix.schedule):
        check_weighted(f"data.mix.schedule[{number}].weights", entry["weights"], names)
