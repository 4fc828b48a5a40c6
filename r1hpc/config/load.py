"""Merge YAML files and dotted overrides into a RunConfig.

    load("jobs/smoke.yaml", ["train.num_steps=20", "resources.nodes=4"])

Later wins: schema defaults, then each file of the job's `include:` list in order, then the job file,
then the cluster profile (section `cluster` only), then the overrides. An unknown key is refused with
the nearest known one. YAML is read by a safe loader: no tags, no aliases, and the scalars of YAML 1.2.
`${key}` is OmegaConf's interpolation, but in the section `cluster` it is left to the shell it is meant for.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import write_atomic
from r1hpc.base.names import nearest, printable
from r1hpc.config.schema import RunConfig, section_of

_MAX_YAML_BYTES = 1 << 20


def assets(folder: str) -> Path:
    """The folder `jobs`, `configs`, `shards` or `sbatch`: of the checkout, or as installed in the wheel."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_assets" / folder
    return installed if installed.is_dir() else package.parent / folder


def find_job(name: str) -> Path:
    """The job file at path `name`, or called so in jobs/ (with or without .yaml).

    Raises:
        ConfigError: neither exists; names the jobs there are.
    """
    jobs = assets("jobs")
    # jobs/smoke.yaml works from any folder; another folder's name must not end in a job of ours.
    for candidate in (Path(name), jobs / name, jobs / f"{name}.yaml", jobs.parent / name):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in jobs.glob("*.yaml"))
    raise ConfigError(
        f"no job {printable(name)!r}{nearest(Path(name).stem, known)}; there are: {', '.join(known)}"
    )


def load(
    job: Path | str | None = None,
    overrides: Sequence[str] = (),
    cluster: str | None = None,
) -> RunConfig:
    """The RunConfig of a job file, a cluster profile and `key=value` overrides.

    Args:
        job: path or name of a job file; None starts from the defaults.
        overrides: dotted `section.key=value`, values in YAML.
        cluster: profile name in configs/cluster/ or a path; None takes $R1HPC_CLUSTER, else none.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, an unreadable file.
    """
    layers = [layer for _, layer in named_layers(job)] if job is not None else []
    return merge_layers(layers, overrides, cluster)


def named_layers(job: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """The files of a job with their contents, each winning over those before it.

    Raises:
        ConfigError: no such job, or it is a chain.
    """
    path = find_job(str(job))
    content = read_yaml(path)
    if "stages" in content:
        raise ConfigError(f"{path} is a chain of stages, not one run: give it to `submit`")
    files = [*_included(content, path), path]
    return list(zip(map(_shown, files), layers_of(content, path), strict=True))


def layers_of(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The files that `content`, read from `path`, includes, in order, and then its own keys."""
    return [
        *map(read_yaml, _included(content, path)),
        {key: value for key, value in content.items() if key != "include"},
    ]


def profile_layer(cluster: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """The cluster profile `cluster`, or that of $R1HPC_CLUSTER, as (file, layer); None: there is none."""
    profile = cluster or os.environ.get("R1HPC_CLUSTER")
    if not profile:
        return None
    path = _find_profile(profile)
    return _shown(path), {"cluster": read_yaml(path)}


def _shown(path: Path) -> str:
    """A file of ours by its place in configs/ or jobs/, any other as it was named."""
    for folder in (assets("configs"), assets("jobs")):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder.parent))
    return str(path)


def merge_layers(
    layers: Sequence[dict[str, Any]], overrides: Sequence[str] = (), cluster: str | None = None
) -> RunConfig:
    """The RunConfig of layers of keys, the cluster profile and overrides; the later wins.

    Raises:
        ConfigError: as `load`.
    """
    profile = profile_layer(cluster)
    if profile is not None:
        layers = [*layers, profile[1]]
    return _to_config(_merge([_shell_is_literal(layer) for layer in layers], overrides))


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; `read` gives the same object back."""
    write_yaml(path, as_layer(config))


def as_layer(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain keys and values: what `save` writes."""
    layer: dict[str, Any] = _plain(dataclasses.asdict(config))
    return layer


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write keys and values so that `read_yaml` gives them back, durably."""
    # Not OmegaConf.to_yaml: it would take a `${` of a shell line for an interpolation of its own.
    write_atomic(path, yaml.dump(content, Dumper=_Dumper, sort_keys=False))


def read(path: Path) -> RunConfig:
    """The configuration frozen in a run folder."""
    return restore(read_yaml(path))


def restore(layer: dict[str, Any]) -> RunConfig:
    """The configuration that `as_layer` made plain."""
    return _to_config(_merge([_literal(layer)], ()))


def _merge(layers: Sequence[dict[str, Any]], overrides: Sequence[str]) -> DictConfig:
    merged = OmegaConf.structured(RunConfig)
    try:
        for layer in layers:
            _check_keys(layer, RunConfig, "")
            merged = OmegaConf.merge(merged, layer)
        for item in overrides:
            merged = OmegaConf.merge(merged, _shell_is_literal(parse_override(item)))
    except TypeError:
        given = f" in {printable(' '.join(overrides))}" if overrides else ""
        raise ConfigError(f"a list stands where NAME: VALUE belongs, or the other way round{given}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
    return cast(DictConfig, merged)


def _to_config(merged: DictConfig) -> RunConfig:
    try:
        return cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None


def _plain(value: Any) -> Any:
    """Enums by their value; everything else as it is."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def _shell_is_literal(layer: dict[str, Any]) -> dict[str, Any]:
    return {**layer, "cluster": _literal(layer["cluster"])} if "cluster" in layer else layer


def _literal(value: Any) -> Any:
    """`value` with every `${` escaped, so that OmegaConf gives it back as it is."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _explain(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0]
    return f"{key}: {first}" if key else first


def parse_override(item: str) -> dict[str, Any]:
    """`section.key=value` as nested keys; refuses what is no KEY=VALUE, no YAML or no key of the schema."""
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {printable(item)!r} is not KEY=VALUE, for example train.num_steps=100")
    try:
        content: Any = yaml.load(value, _Loader) if value else None
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override {printable(item)!r}: the value is not valid YAML; quote it") from None
    for part in reversed(key.split(".")):
        content = {part: content}
    assert isinstance(content, dict)
    _check_keys(content, RunConfig, "")
    return content


def _check_keys(values: dict[str, Any], schema: type, prefix: str) -> None:
    """Refuse keys the schema lacks, naming the nearest; free-form dictionaries are not looked into."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            full = f"{prefix}{printable(str(key))}"
            raise ConfigError(f"unknown key {full!r}{nearest(full, known_keys())}")
        section = section_of(fields[key])
        if section is not None:
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{prefix}{key} is a section: give its keys, as in {prefix}{key}.NAME=VALUE"
                )
            _check_keys(value, section, f"{prefix}{key}.")


def known_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for f in dataclasses.fields(schema):
        section = section_of(f)
        keys += known_keys(section, f"{prefix}{f.name}.") if section else [f"{prefix}{f.name}"]
    return keys


class _Loader(yaml.SafeLoader):
    """YAML without aliases (a bomb of them fills memory), with the plain scalars of YAML 1.2.

    YAML 1.1, which PyYAML reads, makes 43200 of 12:00:00, true of `on`, 83 of 0123, a date of 2026-01-01 and
    a string of 1e-4. A time limit of 43200 minutes is thirty days.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as the string it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$", list("-+0123456789.")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: unreadable, too large, not valid, or not keys and values.
    """
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ConfigError(f"{path} is larger than 1 MiB: that is no configuration")
        content = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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


def _included(content: Mapping[str, Any], job: Path) -> list[Path]:
    names = content.get("include")
    if names is None:
        return []
    if not isinstance(names, list):
        raise ConfigError(f"{job}: include must be a list, as in `include: [model/tiny]`")
    return [_find_include(str(name), job) for name in names]


def _find_include(name: str, job: Path) -> Path:
    for candidate in (assets("configs") / f"{name}.yaml", job.parent / name, job.parent / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    configs = assets("configs")
    known = sorted(str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml"))
    raise ConfigError(f"{job} includes {printable(name)!r}, which is not in configs/{nearest(name, known)}")


def _find_profile(name: str) -> Path:
    folder = assets("configs") / "cluster"
    for candidate in (folder / f"{name}.yaml", Path(name)):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    hint = nearest(name, known)
    raise ConfigError(f"no cluster profile {printable(name)!r}{hint}; there are: {', '.join(known)}")
