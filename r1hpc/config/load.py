"""Load a job file, its presets and dotted overrides into a RunConfig; write and read a run's config.yaml.

Later wins: schema defaults, the files of the job's `include:` list in order, the job file, the cluster
profile (section `cluster` only), the overrides. config/layers.py says when a mapping replaces an earlier one,
and when it is merged. An error for an unknown key names the nearest one. `${key}` is OmegaConf's
interpolation, of plain values alone; the section `cluster` leaves it to the shell.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import yaml

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import at_home, nearest, printable
from r1hpc.config.assets import assets as assets
from r1hpc.config.assets import find_include, find_job, find_profile, shown
from r1hpc.config.layers import merged, over_presets, value_at
from r1hpc.config.other_names import REMOVED, is_removed, name_here, without_removed
from r1hpc.config.schema.ranges import check_ranges
from r1hpc.config.schema.run import RunConfig, section_of, settings_of
from r1hpc.config.stages import WORKLOADS, check_stage, find_workload
from r1hpc.config.yaml_files import MERGE, REPLACE, KeyTwiceError, Loader, write_yaml
from r1hpc.config.yaml_files import read_yaml as read_yaml

_T = TypeVar("_T")
_OF_THE_SHELL = ("setup",)
"""Keys of the section `cluster` that the job's shell reads."""
_REFERENCE = re.compile(r"(?<!\\)\$\{([\w.]+)\}")
_BEFORE: dict[str, Any] = {"rl": {"kl_gradient": "value"}}
"""Behaviour of runs made before these settings existed, if it differs from today's default."""


def load(
    job: Path | str | None = None, overrides: Sequence[str] = (), cluster: str | None = None
) -> RunConfig:
    """Return the RunConfig of a job file, a cluster profile and `key=value` overrides.

    Args:
        job: path or name of a job file; None starts from the defaults.
        overrides: dotted `section.key=value`, values in YAML.
        cluster: profile name in configs/cluster/ or ~/.config/r1hpc/cluster/, or a path; None takes
            $R1HPC_CLUSTER, else none.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, an unreadable file.
    """
    layers = [layer for _, layer in named_layers(job)] if job is not None else []
    return merge_layers(layers, overrides, cluster)


def named_layers(job: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """Return the files of a job with their contents, the later wins. A chain is refused."""
    path = find_job(str(job))
    content = read_job(path)
    if "stages" in content:
        raise ConfigError(
            f"{path} is a chain of stages, not one run: `submit {path.stem} --dry-run` plans each; here "
            "name a job file of one stage"
        )
    files = [*_included(content, path), path]
    return list(zip(map(shown, files), layers_of(content, path), strict=True))


def is_chain_file(path: Path) -> bool:
    """True if a job file describes a chain, not one run."""
    return "stages" in read_job(path)


def read_job(path: Path) -> dict[str, Any]:
    """Return the keys of a job file, or of a script that was given in its place."""
    if path.suffix in (".py", ".sh"):
        return {"stage": "script", "script": {"path": str(path.absolute())}}
    return read_yaml(path)


def layers_of(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the files included by `content` (read from `path`) in order, then its own keys."""
    own = {key: value for key, value in content.items() if key != "include"}
    return [*over_presets([read_yaml(file) for file in _included(content, path)], [own]), own]


def profile_layer(cluster: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """Return (file, layer) of the profile `cluster` or $R1HPC_CLUSTER; None if neither is given."""
    profile = cluster or os.environ.get("R1HPC_CLUSTER")
    if not profile:
        return None
    path = find_profile(profile)
    return shown(path), {"cluster": {"name": path.stem, **read_yaml(path)}}


def merge_layers(
    layers: Sequence[dict[str, Any]], overrides: Sequence[str] = (), cluster: str | None = None
) -> RunConfig:
    """Return the RunConfig of layers, the cluster profile and overrides; the later wins."""
    profile = profile_layer(cluster)
    if profile is not None:
        layers = [*layers, profile[1]]
    changes = [parse_override(item) for item in overrides]
    for layer in layers:
        _check_keys(layer, RunConfig, "")
    content = _at_home(merged(layers, changes))
    if "${" in str({**content, "cluster": None}):
        content = _with_references(content)
    config = cast(RunConfig, _section(RunConfig, content, ""))
    check_stage(config.stage)
    check_ranges(config)
    options_of(config)
    return config


def options_of(config: RunConfig) -> Any:
    """Return the section `options` in the type that the stage of another package declares; else as it is.

    Raise ConfigError with the key for an unknown or missing one, a wrong type or range.
    """
    schema = None if config.stage in WORKLOADS else find_workload(config.stage).options
    return config.options if schema is None else _own_section(config.options, schema, "options.")


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; `read` gives the same object back."""
    write_yaml(path, as_layer(config))


def renew(config: RunConfig, path: Path) -> None:
    """Write a continued run's configuration with the keys that its frozen code knows."""
    write_yaml(path, renewed(config, read_yaml(path)))


def renewed(config: RunConfig, old: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys of an `old` one, whose frozen code may be older.

    A key that it lacks is left out if its value matches the old behaviour. One removed since is kept.
    """
    layer: dict[str, Any] = _known_keys_only(as_layer(config), old, as_layer(restore({})))
    for section, keys in REMOVED.items():
        before = value_at(old, section) or {}
        for key in (key for key in keys if key in before):
            value_at(layer, section)[key] = before[key]
    return layer


def is_known(key: str, layer: Mapping[str, Any]) -> bool:
    """True if a frozen configuration has this key, so that its code knows it."""
    schema: Any = RunConfig
    for part in key.split("."):
        if part not in layer:
            return False
        layer, schema = layer[part], section_of(schema.__dataclass_fields__[part])
        if schema is None:
            break
    return True


def _known_keys_only(new: Any, old: Any, default: Any) -> Any:
    if not (isinstance(new, dict) and isinstance(old, dict) and isinstance(default, dict)):
        return new
    return {
        key: _known_keys_only(value, old.get(key), default.get(key))
        for key, value in new.items()
        if key in old or value != default.get(key)
    }


def as_layer(config: RunConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain keys and values, as `save` writes it."""
    return cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def read(path: Path) -> RunConfig:
    """Return the configuration frozen in a run folder; a ConfigError names the file and what is wrong."""
    layer = read_yaml(path)
    try:
        return restore(layer)
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged, or from another version of r1hpc: {error}") from None


def restore(layer: dict[str, Any]) -> RunConfig:
    """Return the configuration from `as_layer`'s plain form; a missing key behaves as before it existed."""
    layer = without_removed(merged([_BEFORE, layer]))
    _check_keys(layer, RunConfig, "")
    return cast(RunConfig, _section(RunConfig, layer, ""))


def read_section(path: Path, schema: type[_T]) -> _T:
    """Return a YAML file that has a schema of its own (a budget, a campaign), checked as settings are."""
    return as_section(read_yaml(path), schema, str(path))


def as_section(values: Mapping[str, Any], schema: type[_T], where: str) -> _T:
    """Return plain values in their schema; an empty one is the default. A ConfigError begins with `where`."""
    try:
        return _own_section(values, schema, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _own_section(values: Mapping[str, Any], schema: type[_T], prefix: str) -> _T:
    """Return plain values in a schema that is no part of RunConfig; null is the default."""
    names = [field.name for field in dataclasses.fields(cast(Any, schema))]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key '{prefix}{printable(str(key))}'{nearest(str(key), names)}")
    given = {key: value for key, value in values.items() if value is not None}
    for field in dataclasses.fields(cast(Any, schema)):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in given and not has_default:
            raise ConfigError(f"{prefix}{field.name} is missing: it has no default")
    section: _T = _section(schema, given, prefix)
    check_ranges(section, prefix)
    return section


def _with_references(content: dict[str, Any]) -> dict[str, Any]:
    """Replace each `${key}`: alone by the value itself, within a text by how it is written."""
    from omegaconf import OmegaConf  # deferred: few jobs need it, and it loads slowly

    values = merged([as_layer(RunConfig()), content])
    values["cluster"] = {key: item for key, item in values["cluster"].items() if "${" not in str(item)}

    def check(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                check(item, f"{key}.{name}")
        elif isinstance(value, list):
            for item in value:
                check(item, key)
        elif isinstance(value, str) and re.search(r"(?<!\\)\$\{", _REFERENCE.sub("", value)):
            raise ConfigError(f"{printable(key)} holds a ${{ that is no reference such as ${{train.seed}}")
        for name in _REFERENCE.findall(value) if isinstance(value, str) else ():
            found = value_at(values, name)
            if found in (None, "???") or isinstance(found, dict | list) or "${" in str(found):
                raise ConfigError(
                    f"{printable(key)} holds ${{{name}}}: only a key with a plain value can be referred to, "
                    "as in ${train.seed}; write the value itself"
                )

    def filled(value: Any, resolved: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(item, resolved[name]) for name, item in value.items()}
        return resolved

    given = {name: item for name, item in content.items() if name != "cluster"}
    for name, item in given.items():
        check(item, name)
    resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    return {**content, **filled(given, resolved)}


def _section(schema: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Make a section of the configuration from plain values; missing keys keep their defaults."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if field.name in values:
            key, value, section = f"{prefix}{field.name}", values[field.name], section_of(field)
            if section is None:
                given[field.name] = _typed(key, value, field.type)
            else:
                given[field.name] = _section(section, value, f"{key}.")
    return schema(**given)


def _typed(key: str, value: Any, annotation: Any) -> Any:
    """Return a value in the type of its setting: 1 becomes 1.0 for a number and "1" for text."""
    if value == "???":
        raise ConfigError(f"{key} is ???, a placeholder: write its value")
    origin, kinds = get_origin(annotation), get_args(annotation)
    if isinstance(value, dict) and (origin is dict or annotation is Any):
        for name in value:
            if not isinstance(name, str if origin is dict else (str, int, float)):
                raise ConfigError(f"{key} has the key {name!r}, which is not text: put it in quotes")
        return {
            name: _typed(f"{key}.{name}", item, kinds[1] if kinds else Any) for name, item in value.items()
        }
    if isinstance(value, list) and (origin is list or annotation is Any):
        kind = kinds[0] if kinds else Any
        return [_typed(f"{key}[{index}]", item, kind) for index, item in enumerate(value)]
    if value is None and (annotation is Any or type(None) in kinds):
        return None
    if origin is dict:
        raise ConfigError(f"{key} is a mapping: write {key}={{NAME: VALUE}}, or {key}.NAME=VALUE")
    if origin is list:
        raise ConfigError(f"{key} is a list: write {key}=[VALUE, VALUE]")
    if isinstance(value, list):
        raise ConfigError(f"{key} is one value, not a list")
    if isinstance(value, dict):
        is_name = list(value.values()) == [None]  # {checkpoint}
        fix = f": quote the braces, '{{{printable(str(next(iter(value))))}}}'" if is_name else ""
        raise ConfigError(f"{key} is one value, not a mapping{fix}")
    kind = kinds[0] if type(None) in kinds else annotation
    if kind in _KINDS:
        accepted, read_as, wanted = _KINDS[kind]
    else:
        accepted, read_as, wanted = (str,), kind, f"one of {', '.join(each.value for each in kind)}"
    if type(value) in accepted:
        try:
            return read_as(value)
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{key} is {printable(repr(value))}: it must be {wanted}")


def _boolean(value: Any) -> bool:
    word = str(value).lower()
    if word in ("yes", "y", "on", "true", "no", "n", "off", "false"):
        return word in ("yes", "y", "on", "true")
    return int(word) != 0


_KINDS: dict[Any, tuple[tuple[type, ...], Callable[[Any], Any], str]] = {
    bool: ((bool, int, str), _boolean, "true or false"),
    int: ((int, str), int, "a whole number"),
    float: ((float, int, str), float, "a number"),
    str: ((str, bool, int, float), str, "text"),
    Any: ((str, bool, int, float), lambda value: value, "text, a number, true, false, a list or a mapping"),
}
"""For each type of a setting: the accepted value types, the conversion, and its name in errors."""


def _at_home(value: Any) -> Any:
    """Expand a leading ~/, since no shell expands it in `data.path=~/x`."""
    if isinstance(value, dict):
        return {key: item if key in _OF_THE_SHELL else _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return at_home(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def parse_override(item: str) -> dict[str, Any]:
    """Return `section.key=value` as nested keys; mappings are marked, since `=` replaces the earlier one.

    Raise ConfigError if it is not KEY=VALUE, not YAML, or not a key of the schema.
    """
    key, sign, text = item.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {printable(item)!r} is not KEY=VALUE, for example train.num_steps=100")
    try:
        value: Any = yaml.load(text, Loader) if text else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = f": {error.problem}" if isinstance(error, KeyTwiceError) else "; quote it"
        raise ConfigError(f"override {printable(item)!r}: the value is not valid YAML{why}") from None
    path, section = _path(key)
    content = _marked(value, section)
    for part in reversed(path):
        content = {part: content}
    assert isinstance(content, dict)
    _check_keys(content, RunConfig, "")
    return content


def value_as_set(item: str) -> Any:
    """Return the value of an override in its setting's type: 0.0001 of `train.lr=1e-4`.

    Raise ConfigError if the key is unknown or the value impossible.
    """
    value: Any = _section(RunConfig, merged([parse_override(item)]), "")
    for part in _path(item.partition("=")[0])[0]:
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _path(key: str) -> tuple[list[str], type | None]:
    """Return the parts of a dotted key, and the section it names, if any.

    The rest after a mapping of numbers or texts is one name, dots too: `reward.terms.rewards.py:brevity`.
    """
    parts, section = key.split("."), RunConfig
    for index, part in enumerate(parts):
        field = section.__dataclass_fields__.get(part)
        inner = section_of(field) if field is not None else None
        if field is None or inner is None:
            is_flat = field is not None and field.type in (dict[str, float], dict[str, str])
            rest = parts[index + 1 :]
            return [*parts[: index + 1], *([".".join(rest)] if rest and is_flat else rest)], None
        section = cast(type[RunConfig], inner)
    return parts, section


def _marked(value: Any, section: type | None) -> Any:
    """Return an override's value with its mappings marked as replacing, except sections."""
    if not isinstance(value, dict):
        return value
    if section is None:
        return value if MERGE in value else {REPLACE: True, **value}
    fields = {f.name: f for f in dataclasses.fields(section)}
    return {
        key: _marked(item, section_of(fields[key])) if key in fields else item for key, item in value.items()
    }


def _check_keys(values: dict[str, Any], schema: type, prefix: str) -> None:
    """Refuse unknown keys, naming the nearest; free-form dictionaries are not checked."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in values.items():
        if key in (REPLACE, MERGE):
            raise ConfigError(
                f"{key} is for a mapping such as reward.terms, not for "
                f"{prefix.removesuffix('.') or 'the whole'}, whose keys are set one by one"
            )
        if key not in fields:
            full = f"{prefix}{printable(str(key))}"
            raise ConfigError(f"unknown key {full!r}{_instead(full, prefix, fields)}")
        section = section_of(fields[key])
        if section is not None:
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{prefix}{key} is a section: give its keys, as in {prefix}{key}.NAME=VALUE"
                )
            _check_keys(value, section, f"{prefix}{key}.")


def _instead(key: str, prefix: str, fields: Iterable[str]) -> str:
    """Return a hint: the key's name here, else the nearest key, else where all are listed."""
    if (here := name_here(key)) is not None:
        return f": here it is {here}"
    if is_removed(key):
        return ", which is gone: leave it out"
    if near := nearest(key, [*(f"{prefix}{name}" for name in fields), *known_keys()]):
        return near
    here = name_here(key, 0.8)
    return f" (is {here} meant?)" if here else "; python -m r1hpc.settings lists all"


def known_keys() -> list[str]:
    """Return every dotted key of the schema."""
    return [key for key, _ in settings_of()]


def _included(content: Mapping[str, Any], job: Path) -> list[Path]:
    names = content.get("include")
    if names is None:
        return []
    if not isinstance(names, list):
        raise ConfigError(f"{job}: include must be a list, as in `include: [model/tiny]`")
    return [find_include(str(name), job) for name in names]
