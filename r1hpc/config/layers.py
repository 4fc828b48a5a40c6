"""Merge configuration files key by key, drop settings that are gone, and read and write YAML safely.

    merged([preset, job], [{"reward": {"terms": {REPLACE: True, "accuracy": 1.0}}}])

The later file wins. A mapping (reward.terms, model.config, task.options ...) replaces an earlier file's, as
`reward.terms={accuracy: 1.0}` does on the command line; `terms: !merge {brevity: 0.1}` adds to it. In section
`cluster`, where a profile adds to a job, mappings are merged unless one says `!replace`. If a later file
sets model.path, the presets' model.config and model.tokenizer are dropped: they describe another model. A key
may appear only once; plain scalars are YAML 1.2's.

    read_yaml(path)                     # a configuration
    read_yaml(path, UniqueKeyLoader)    # a recipe
    yaml.dump(content, Dumper=Dumper)
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any, cast

import yaml

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import write_atomic
from r1hpc.base.names import printable
from r1hpc.config.schema.rl import DEFAULT_TERMS
from r1hpc.config.schema.run import RunConfig, section_of

REMOVED = {
    "data.mix": ("online", "every", "smoothing"),
    "rl": ("by_pass_rate",),
    "cluster": ("network_gbit_s",),
}
"""Settings that earlier runs have and today's code ignores."""
REPLACE, MERGE = "!replace", "!merge"
"""Keys that mark a mapping as replacing the earlier ones, or adding to them; no setting has these names."""
Layer = dict[str, Any]
_MOST_BYTES = 1 << 20


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


class KeyTwiceError(yaml.constructor.ConstructorError):
    """A mapping has the same key twice."""


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise KeyTwiceError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


class Loader(UniqueKeyLoader):
    """YAML without aliases (a bomb fills memory), with `!replace`, `!merge` and YAML 1.2's plain scalars.

    PyYAML reads YAML 1.1: 12:00:00 becomes 43200, `on` true, 0123 83, 2026-01-01 a date and 1e-4 a string. A
    time limit of 43200 minutes is thirty days.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _construct_marked(loader: Loader, node: Any) -> dict[Any, Any]:
    return {node.tag: True, **loader.construct_mapping(node, deep=True)}


for _tag in (REPLACE, MERGE):
    Loader.add_constructor(_tag, _construct_marked)


class Dumper(yaml.SafeDumper):
    """A dumper that quotes every string that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$", list("-+0123456789.")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def without_removed(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer of an earlier version without the settings that are gone."""
    layer = copy.deepcopy(layer)
    for section, keys in REMOVED.items():
        values = value_at(layer, section)
        for key in keys if isinstance(values, dict) else ():
            values.pop(key, None)
    return layer


def is_removed(key: str) -> bool:
    """True if earlier versions had this dotted key."""
    section, _, name = key.rpartition(".")
    return name in REMOVED.get(section, ())


def read_yaml(path: Path, loader: type[UniqueKeyLoader] = Loader) -> dict[str, Any]:
    """Return the keys and values of a YAML file; an empty file has none.

    Raise ConfigError if it is unreadable, too large, not valid, or does not hold keys and values.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} is larger than 1 MiB: that is no configuration")
        with path.open(encoding="utf-8") as file:  # errors then name the file
            content = yaml.load(file, loader)
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8; a number with more digits than Python reads
        raise ConfigError(f"{path} is not valid YAML: {printable(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply: that is no configuration") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return content


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write keys and values durably, so that `read_yaml` returns them."""
    write_atomic(path, yaml.dump(content, Dumper=Dumper, sort_keys=False))
