"""Merge configuration files, whose keys load.py has checked; it then checks the values too.

    merged([preset, job], [{"reward": {"terms": {REPLACE: True, "accuracy": 1.0}}}])

The later file wins. A mapping (reward.terms, model.config, task.options ...) replaces an earlier file's, as
`reward.terms={accuracy: 1.0}` does on the command line; `terms: !merge {brevity: 0.1}` adds to it. In section
`cluster`, where a profile adds to a job, mappings are merged unless one says `!replace`. If the job file
or an override sets model.path, model.config and model.tokenizer of the files before it are dropped: they
describe another model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any

from r1hpc.config.schema.rl import DEFAULT_TERMS
from r1hpc.config.schema.run import RunConfig, section_of
from r1hpc.config.yaml_files import MERGE, REPLACE

Layer = dict[str, Any]


def merged(layers: Sequence[Layer], overrides: Sequence[Layer] = ()) -> Layer:
    """Merge all layers into one; the later wins. Any file's reward.terms replace the schema's, and an
    override changes them."""
    has_terms = [
        any("terms" in layer["reward"] for layer in some if isinstance(layer.get("reward"), dict))
        for some in (layers, overrides)
    ]
    defaults: Layer = {"reward": {"terms": dict(DEFAULT_TERMS)}} if has_terms == [False, True] else {}
    return reduce(_over, effective([defaults, *layers], overrides), {})


def effective(layers: Sequence[Layer], overrides: Sequence[Layer]) -> list[Layer]:
    """Return the layers, then the overrides, each without values that a later one replaces."""
    found: list[Layer] = []
    for layer in [*map(_replacing, over_presets(layers, overrides)), *overrides]:
        found = [_without(earlier, layer) for earlier in found]
        found.append(_unmarked(layer))
    return found


def over_presets(presets: Sequence[Layer], later: Sequence[Layer]) -> list[Layer]:
    """Return the presets without the model if a model.path in `later` replaces it."""
    models = [layer["model"] for layer in later if isinstance(layer.get("model"), dict)]
    if all(model.get("path") is None for model in models):
        return list(presets)
    another: Layer = {"model": {"config": {REPLACE: True}, "tokenizer": {REPLACE: True}}}
    return [_without(preset, another) for preset in presets]


def _replacing(layer: Layer, schema: type = RunConfig) -> Layer:
    """Return a file's layer with its mappings marked, except those that ask to be merged."""
    marked = dict(layer)
    for each in fields(schema):
        value, section = layer.get(each.name), section_of(each)
        if not isinstance(value, dict) or MERGE in value or each.name == "cluster":
            continue
        marked[each.name] = _replacing(value, section) if section else {REPLACE: True, **value}
    return marked


def _without(below: Layer, above: Layer) -> Layer:
    kept = {}
    for key, value in below.items():
        other = above.get(key)
        if isinstance(other, dict):
            if REPLACE in other:
                continue
            value = _without(value, other) if isinstance(value, dict) else value
        kept[key] = value
    return kept


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmarked(item) for key, item in value.items() if key not in (REPLACE, MERGE)}
    return [_unmarked(item) for item in value] if isinstance(value, list) else value


def _over(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    common = {key: _over(below[key], value) if key in below else value for key, value in above.items()}
    return {**below, **common}


def leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a layer, and their values."""
    for key, value in layer.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_at(layer: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if the layer does not have it."""
    value: Any = layer
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
