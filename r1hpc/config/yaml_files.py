"""Read and write YAML files safely, without duplicate keys.

read_yaml(path)                     # a configuration: no aliases, plain scalars as in YAML 1.2
read_yaml(path, UniqueKeyLoader)    # a recipe of a dataset: YAML 1.1, aliases are allowed
write_yaml(path, content)
"""

import re
from pathlib import Path
from typing import Any, cast

import yaml

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import write_atomic
from r1hpc.base.names import printable

REPLACE, MERGE = "!replace", "!merge"
"""Tags, and the keys that mark a mapping that has one; config/layers.py says what they do."""
_MOST_BYTES = 1 << 20


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
            raise yaml.YAMLError(
                "anchors and aliases (&name, *name) are not read here: write the value out, or share it by "
                "`include: [FILE]`"
            )
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
