"""Which layer of keys wins: files are merged key by key, and what a person says replaces what a preset says.

    merged([preset, job], [{"reward": {"terms": {REPLACE: True, "accuracy": 1.0}}}])

A mapping (reward.terms, model.config, task.options ...) is merged with that of an earlier file, unless it is
marked: `terms: !replace {accuracy: 1.0}` in a file, `reward.terms={accuracy: 1.0}` on the command line. A
model.path replaces the model of the presets: their model.config and model.tokenizer are of another one.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

from r1hpc.config.reasoning import RewardConfig

REPLACE = "!replace"
"""The key that marks a mapping which replaces the earlier ones; no setting can be called so."""
Layer = dict[str, Any]


def merged(layers: Sequence[Layer], overrides: Sequence[Layer] = ()) -> Layer:
    """One layer of all; the later wins. The schema's reward.terms yield to any file's."""
    is_given = any("terms" in layer["reward"] for layer in layers if isinstance(layer.get("reward"), dict))
    defaults: Layer = {} if is_given else {"reward": {"terms": RewardConfig().terms}}
    return reduce(_over, effective([defaults, *layers], overrides), {})


def effective(layers: Sequence[Layer], overrides: Sequence[Layer]) -> list[Layer]:
    """The layers, then the overrides, each without what a later one replaces as a whole."""
    found: list[Layer] = []
    for layer in [*over_presets(layers, overrides), *overrides]:
        found = [_without(earlier, layer) for earlier in found]
        found.append(_unmarked(layer))
    return found


def over_presets(presets: Sequence[Layer], later: Sequence[Layer]) -> list[Layer]:
    """The presets without the model that a model.path in one of `later` replaces."""
    models = [layer["model"] for layer in later if isinstance(layer.get("model"), dict)]
    if all(model.get("path") is None for model in models):
        return list(presets)
    another: Layer = {"model": {"config": {REPLACE: True}, "tokenizer": {REPLACE: True}}}
    return [_without(preset, another) for preset in presets]


def _without(below: Layer, above: Layer) -> Layer:
    """`below` without the values whose place in `above` is marked."""
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
        return {key: _unmarked(item) for key, item in value.items() if key != REPLACE}
    return [_unmarked(item) for item in value] if isinstance(value, list) else value


def _over(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    common = {key: _over(below[key], value) if key in below else value for key, value in above.items()}
    return {**below, **common}
