"""Read a chain file: stages, each a job of its own, and the stages each one needs.

    include: [model/tiny_gpt2]            # common keys: over all presets, under a stage's own keys
    resources: {gpus_per_node: 0}
    stages:
      - name: sft
        stage: sft
        train: {num_steps: 900}
      - name: grpo
        include: [rl/r1]
        stage: rl
        model: {path: "${stage:sft}/model"}

`${stage:NAME}` is the run folder of that stage. A stage needs those it refers to and those in its `needs:`
list; with neither it needs the stage before it. `needs: []` depends on nothing. A stage begins when all it
needs are finished.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.attempt.workload import workload_of
from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.files import write_atomic
from r1hpc.base.names import check_name, nearest, printable
from r1hpc.config import load
from r1hpc.config.layers import leaves, over_presets, value_at
from r1hpc.config.paths import with_absolute_paths
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.yaml_files import write_yaml
from r1hpc.submission.chain.folder import TAKEN_NAMES, ChainDir

_REFERENCE = re.compile(r"\$\{stage:([^}]*)\}")
_OF_STAGE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*):([^=]+=.*)", re.DOTALL)


@dataclass(frozen=True)
class Stage:
    """One stage, with every reference resolved."""

    name: str
    needs: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Definition:
    """A chain: its stages, each after all it needs."""

    source: str
    """The file it was read from."""
    digest: str
    """Digest of that file with all it includes, before overrides: shows if the file has changed since."""
    stages: tuple[Stage, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        return {stage.name: stage.needs for stage in self.stages}

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class _Entry:
    """One item of `stages:`, read but not resolved."""

    name: str
    needs: tuple[str, ...] | None
    layers: tuple[dict[str, Any], ...]


def read_definition(
    path: Path, chain: ChainDir, overrides: Sequence[str] = (), cluster: str | None = None
) -> Definition:
    """Return the chain in a file, with references into the folder of `chain`.

    Raise ConfigError for a missing stage, need or reference, a circle, or an unusable value. Raise UsageError
    if an override for every stage would cut one off from another.

    Args:
        overrides: `section.key=value` for every stage, `STAGE:section.key=value` for one.
    """
    entries = _entries(path)
    needs = _all_needs(entries, path)
    _check_order(needs, path)
    of_stage = split_overrides(overrides, list(needs))
    _refuse_cut(overrides, {entry.name: entry.layers for entry in entries}, _REFERENCE)
    configs = {entry.name: _config(entry, of_stage[entry.name], chain, needs, cluster) for entry in entries}
    stages = tuple(Stage(name, needs[name], config) for name, config in connected(configs, needs).items())
    return Definition(str(path.absolute()), _digest(entries), stages)


def save_definition(definition: Definition, chain: ChainDir) -> None:
    """Write chain.yaml; `open_definition` returns the same object, also in older frozen code of a stage."""
    before = load.read_yaml(chain.definition)["stages"] if chain.definition.is_file() else []
    old = {item["name"]: item["config"] for item in before}
    stages = []
    for stage in definition.stages:
        is_new = stage.name not in old
        config = load.as_layer(stage.config) if is_new else load.renewed(stage.config, old[stage.name])
        stages.append({"name": stage.name, "needs": list(stage.needs), "config": config})
    content = {
        "source": definition.source,
        "digest": definition.digest,
        "folder": str(chain.path),
        "stages": stages,
    }
    write_yaml(chain.definition, content)


def by_its_first_path(chain: ChainDir) -> ChainDir:
    """Return the chain by the path it was begun under, if that leads to it: its stages refer to that path.

    A home or scratch folder that is a link has two paths.
    """
    first = load.read_yaml(chain.definition).get("folder")
    return ChainDir(first) if isinstance(first, str) and _leads_to(first, chain) else chain


def _leads_to(folder: str, chain: ChainDir) -> bool:
    return Path(folder).is_dir() and Path(folder).samefile(chain.path)


def renamed(chain: ChainDir) -> list[str]:
    """Put the chain's new place into its paths if its folder was moved or renamed, and return a note."""
    first = load.read_yaml(chain.definition).get("folder")
    if not isinstance(first, str) or first == str(chain.path) or _leads_to(first, chain):
        return []
    # The definition comes last: after a kill the next submission does it all again.
    place = re.compile(rf"{re.escape(first)}(?=[/'\"\s]|$)", re.MULTILINE)
    for path in [*chain.path.glob("*/config.yaml"), chain.definition]:
        if not path.parent.is_symlink():  # another chain's stage
            write_atomic(path, place.sub(str(chain.path), path.read_text()))
    return [f"{chain.name} was {first}: its stages go on in {chain.path}"]


def open_definition(chain: ChainDir) -> Definition:
    """Return the definition frozen in a chain's folder."""
    content = load.read_yaml(chain.definition)
    try:
        stages = tuple(
            # Earlier versions wrote paths relative to the folder of the submission.
            Stage(item["name"], tuple(item["needs"]), with_absolute_paths(load.restore(item["config"])))
            for item in content["stages"]
        )
        return Definition(content["source"], content["digest"], stages)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        wrong = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{chain.definition} is damaged, or from another version of r1hpc: {wrong}. Restore it, name the "
            "folder of a stage, or submit the job file under another --run-name"
        ) from None


def override(
    definition: Definition, overrides: Sequence[str], chain: ChainDir, cluster: str | None = None
) -> Definition:
    """Return the definition with overrides over what was frozen.

    Raise UsageError if one for every stage would cut a stage off from another.
    """
    frozen = {stage.name: [load.as_layer(stage.config)] for stage in definition.stages}
    _refuse_cut(overrides, frozen, re.compile(re.escape(f"{chain.path}/")))
    stages = []
    for stage in definition.stages:
        own = overrides_of(stage.name, overrides, definition.names, chain)
        config = load.merge_layers(frozen[stage.name], own, cluster)
        stages.append(replace(stage, config=with_absolute_paths(config)))
    return replace(definition, stages=tuple(stages))


def overrides_of(name: str, overrides: Sequence[str], names: Sequence[str], chain: ChainDir) -> list[str]:
    """Return the overrides for one stage, without its name, with references resolved."""
    return [_resolve(item, chain, names) for item in split_overrides(overrides, names)[name]]


def digest_of(path: Path) -> str:
    """Return the digest of a chain file as it is now."""
    return _digest(_entries(path))


def split_overrides(overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return per stage the overrides for all, then its own, each without the stage's name.

    Raise UsageError for an override of a stage that does not exist.
    """
    found_in = {item: _for_one_stage(item, names) for item in overrides}
    common = [item for item in overrides if not found_in[item]]
    split = {name: list(common) for name in names}
    for item in overrides:
        if found := found_in[item]:
            if found[1] not in split:
                raise UsageError(f"{printable(item)!r}: {no_stage(found[1], names)}")
            split[found[1]].append(found[2])
    return split


def _for_one_stage(item: str, names: Sequence[str]) -> re.Match[str] | None:
    """Return the stage that an override is for, and the rest of it; None if it is for all of them."""
    found = _OF_STAGE.fullmatch(item)
    if found and found[1] not in names:
        section, dot, _ = found[1].partition(".")
        if dot and section in RunConfig.__dataclass_fields__:
            return None  # a key that contains a colon: reward.terms.rewards.py:brevity
    return found


def without_stage(item: str) -> str:
    """Return an override without the name of its stage."""
    found = _OF_STAGE.fullmatch(item)
    return found[2] if found else item


def _entries(path: Path) -> list[_Entry]:
    """Return the stages of a chain file, each with the common keys under its own."""
    content = load.read_yaml(path)
    common = {key: value for key, value in content.items() if key != "stages"}
    *presets, for_all = load.layers_of(common, path)
    items = content["stages"]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ConfigError(f"{path}: `stages` must be a list of stages, each beginning with `- name: NAME`")
    names = [item.get("name") for item in items]
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: a stage has no name: begin each with `- name: NAME`")
        check_name(name, f"{path}: the stage name")
        if name in TAKEN_NAMES:
            raise ConfigError(
                f"{path}: a stage cannot be called {name!r}: the chain's folder has that already"
            )
        if names.count(name) > 1:
            raise ConfigError(f"{path}: two stages are called {name!r}")
    entries = []
    for item in items:
        name, needs = item["name"], item.get("needs")
        if needs is not None and not (isinstance(needs, list) and all(isinstance(n, str) for n in needs)):
            raise ConfigError(f"{path}: `needs` of {name} must be a list of stages, as in needs: [sft]")
        own = {key: value for key, value in item.items() if key not in ("name", "needs")}
        *its_presets, its_own = load.layers_of(own, path)
        under = over_presets([*presets, *its_presets], [for_all, its_own])
        layers = (*under, for_all, its_own)
        entries.append(_Entry(name, None if needs is None else tuple(needs), layers))
    return entries


def _all_needs(entries: Sequence[_Entry], path: Path) -> dict[str, tuple[str, ...]]:
    """Return the needs of each stage: its list and its references, else the stage before it."""
    names = [entry.name for entry in entries]
    found = {}
    for index, entry in enumerate(entries):
        named = list(dict.fromkeys([*(entry.needs or ()), *_references(entry.layers)]))
        for name in named:
            if name not in names:
                raise ConfigError(
                    f"{path}: stage {entry.name} needs {printable(name)!r}: {no_stage(name, names)}"
                )
        if not named and entry.needs is None:
            named = names[max(0, index - 1) : index]
        found[entry.name] = tuple(named)
    return found


def _check_order(needs: Mapping[str, tuple[str, ...]], path: Path) -> None:
    """Refuse a stage before one it needs, and so a circle: the file shows the order of execution."""
    seen: set[str] = set()
    for name, needed in needs.items():
        late = [other for other in needed if other not in seen]
        if late:
            raise ConfigError(
                f"{path}: {name} needs {late[0]}, which does not come before it: write {late[0]} first"
            )
        seen.add(name)


def _references(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in _references(item)]
    if isinstance(value, list | tuple):
        return [name for item in value for name in _references(item)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _refuse_cut(
    overrides: Sequence[str], stages: Mapping[str, Sequence[Mapping[str, Any]]], link: re.Pattern[str]
) -> None:
    """Refuse an override for every stage that would replace what a stage takes from another.

    `model.path=MODEL` is meant for the start of the chain. Applied to every stage, RL would start from that
    model and not from the cold start.

    Args:
        stages: by name, their layers, the last of which counts.
        link: the form of another stage's folder in a value.
    """
    for item in overrides:
        if _for_one_stage(item, list(stages)):
            continue
        for key, value in leaves(load.parse_override(item)):
            given = {name: had for name, layers in stages.items() if (had := _last_at(layers, key))}
            cut = [name for name, had in given.items() if link.search(str(had)) and had != value]
            if cut:
                meant = " ".join(f"{name}:{item}" for name in given if name not in cut) or f"{cut[0]}:{item}"
                raise UsageError(
                    f"{printable(item)} is for every stage, but {key} comes from another stage "
                    f"in {', '.join(cut)}: say which stages it is for, as in {printable(meant)}"
                )


def _last_at(layers: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Return the value of a dotted key in the last layer that has it; None if no layer has it."""
    found = (value_at(layer, key) for layer in reversed(layers))
    return next((value for value in found if value is not None), None)


def _config(
    entry: _Entry,
    overrides: Sequence[str],
    chain: ChainDir,
    needs: Mapping[str, tuple[str, ...]],
    cluster: str | None,
) -> RunConfig:
    for name in _references(list(overrides)):
        if name in needs and name not in needs[entry.name]:
            raise UsageError(
                f"an override refers to ${{stage:{printable(name)}}}, which {entry.name} does not need: "
                f"add it to `needs` of {entry.name} in the chain file"
            )
    try:
        config = load.merge_layers(
            [_resolve(layer, chain, needs) for layer in entry.layers],
            [_resolve(item, chain, needs) for item in overrides],
            cluster,
        )
        return with_absolute_paths(config)  # a chain may be submitted again from another folder
    except ConfigError as error:
        raise ConfigError(f"stage {entry.name}: {error}") from None


def _resolve(value: Any, chain: ChainDir, names: Iterable[str]) -> Any:
    """Replace every reference in `value` by its run folder."""
    if isinstance(value, dict):
        return {key: _resolve(item, chain, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, chain, names) for item in value]
    if not isinstance(value, str):
        return value

    def folder(found: re.Match[str]) -> str:
        if found[1] not in names:
            raise UsageError(no_stage(found[1], list(names)))
        return str(chain.stage(found[1]).path)

    return _REFERENCE.sub(folder, value)


def no_stage(name: str, names: Sequence[str]) -> str:
    """Return the sentence on a stage that is not there."""
    known = ", ".join(names)
    return f"there is no stage {printable(name)!r}{nearest(name, names)}; there are: {known}"


def _digest(entries: Sequence[_Entry]) -> str:
    content = [[entry.name, entry.needs, entry.layers] for entry in entries]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def connected(configs: Mapping[str, RunConfig], needs: Mapping[str, Sequence[str]]) -> dict[str, RunConfig]:
    """Return the stages in order, each completed from the stages before it."""
    done: dict[str, RunConfig] = {}
    for name, config in configs.items():
        earlier = {each: done[each] for each in stages_before(name, needs)}
        try:
            done[name] = workload_of(config.stage).connect(name, config, earlier)
        except UsageError as error:
            raise UsageError(f"stage {name}: {error}") from None
    return done


def stages_before(name: str, needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the stages that a stage needs, directly or not; each once."""
    found: list[str] = []
    open_ = list(needs[name])
    while open_:
        each = open_.pop(0)
        if each not in found:
            found.append(each)
            open_ += needs[each]
    return found
