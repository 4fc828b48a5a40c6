"""Settings of a mixture of sources whose weights change while a run goes on: data.mix."""

import math
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.checks import ranged


@dataclass(frozen=True)
class MixConfig:
    """Weights of the dataset's sources that change while the run goes on. Until then the recipe's hold, or
    the sources' sizes. A source whose weight is 0 rests."""

    schedule: list[dict[str, Any]] = field(default_factory=list)
    """[{from_step: N, weights: {SOURCE: WEIGHT, …}}, …]: from optimizer step N on. Steps are counted from 1;
    from_step 1 takes the place of the recipe's weights. `submit --resume` may change what has not begun."""
    online: str = ranged("none", choices=("none", "odm"))
    """odm: Online Data Mixing (arXiv 2312.02406): sources that the model predicts badly gain weight. Of a
    schedule only from_step 1 goes with it."""
    every: int = ranged(500, least=1)
    """odm: steps between two changes, a multiple of checkpoint.save_every: what a change follows from is in
    the checkpoint that holds it."""
    smoothing: float = ranged(0.9, least=0, below=1)
    """odm: of the moving average of a source's loss over these."""

    def __post_init__(self) -> None:
        last = 0
        for number, entry in enumerate(self.schedule):
            last = _check_change(f"data.mix.schedule[{number}]", entry, after=last)
        if self.is_online and last > 1:
            raise ConfigError(
                f"data.mix.online={self.online} and data.mix.schedule from step {last} on both change the "
                "weights: take one of them"
            )

    @property
    def is_online(self) -> bool:
        return self.online != "none"

    @property
    def is_used(self) -> bool:
        return bool(self.schedule) or self.is_online


def _check_change(key: str, entry: dict[str, Any], *, after: int) -> int:
    """The step from which an entry of a schedule holds, which must come after that of the entry before."""
    for name in entry:
        if name not in ("from_step", "weights"):
            form = "{from_step: N, weights: {SOURCE: WEIGHT}}"
            raise ConfigError(f"{key} has no key {name!r}: it is {form}")
    step, weights = entry.get("from_step"), entry.get("weights")
    if isinstance(step, bool) or not isinstance(step, int) or step <= after:
        raise ConfigError(f"{key}.from_step is {step!r}: it must be a whole number above {after}")
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"{key}.weights is {weights!r}: give each source its weight, {{SOURCE: WEIGHT}}")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise ConfigError(f"{key}.weights has the key {name!r}: the name of a source is text, '{name}'")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigError(f"{key}.weights.{name} is {weight!r}: it must be a number, at least 0")
    if not any(weights.values()):
        raise ConfigError(f"{key}.weights are all 0: give one source some weight")
    return step
