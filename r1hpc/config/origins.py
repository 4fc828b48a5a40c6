"""Tell `r1hpc settings` where each value comes from: schema, file, cluster profile or override."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.config.layers import effective, value_at
from r1hpc.config.load import as_layer, known_keys, load, named_layers, parse_override, profile_layer
from r1hpc.config.schema.run import RunConfig

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """One key of the schema with its value for a run."""

    key: str
    """Dotted."""
    value: Any
    source: str
    """`default`, the file that set it last, or the override as given. If several wrote parts of a mapping,
    all of them, joined by ` + `."""

    @property
    def is_set(self) -> bool:
        return self.source != DEFAULT


def resolved(
    job: Path | str | None = None, overrides: Sequence[str] = (), cluster: str | None = None
) -> list[Setting]:
    """Return every key of the schema, in its order, with its value after `load`."""
    values = as_layer(load(job, overrides, cluster))
    layers = list(named_layers(job)) if job is not None else []
    profile = profile_layer(cluster)
    layers += [profile] if profile is not None else []
    names = [*(name for name, _ in layers), *overrides]
    effects = effective([layer for _, layer in layers], [parse_override(item) for item in overrides])
    named = list(zip(names, effects, strict=True))
    return [Setting(key, value_at(values, key), _source_of(key, named)) for key in known_keys()]


def frozen(config: RunConfig, source: str) -> list[Setting]:
    """Return every key of a submitted run; `source` stands for all values that differ from the defaults."""
    values, usual = as_layer(config), as_layer(RunConfig())
    pairs = [(key, value_at(values, key), value_at(usual, key)) for key in known_keys()]
    return [Setting(key, value, DEFAULT if value == default else source) for key, value, default in pairs]


def _source_of(key: str, layers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the key's source: the last layer that sets a scalar or list, all that merge into a mapping."""
    found: list[str] = []
    section, _, setting = key.rpartition(".")
    for name, layer in layers:
        values = value_at(layer, section) if section else layer
        if isinstance(values, dict) and setting in values:
            is_mapping = isinstance(values[setting], dict) and values[setting]
            found = [*found, name] if is_mapping else [name]
    return " + ".join(dict.fromkeys(found)) or DEFAULT
