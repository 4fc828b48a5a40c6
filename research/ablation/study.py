"""An ablation as ordinary chains, one per seed, all in one folder under the run root.

    study = open_study(folder, "reward", job, overrides, arms=None)
    for seed in range(3):
        done = submit_seed(study, seed, order)      # a chain like any other: again goes on where it stopped

<run_root>/ablate-reward/
    study.json              what was asked for, resolved; later calls go on with it
    seed0.yaml seed0/ …     the chain of each seed: traces, sft-<digest> and one stage per arm

Everything random hangs on the seed: demonstrations, questions, held-out items, weights, order, samples. So
the arms of one seed are alike in all but their settings. A cold start that another ablation under the
same run root has finished, with the same seed and settings, is used and not trained again.
"""

import copy
import functools
import hashlib
import json
import operator
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.names import check_name, printable
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.assets import find_job
from r1hpc.config.schema.rl import RewardConfig
from r1hpc.config.yaml_files import write_yaml
from r1hpc.submission.chain.file import open_definition, without_stage
from r1hpc.submission.chain.folder import ChainDir, supervisor_pid
from r1hpc.submission.order import Order, Purpose
from r1hpc.submission.start_run import create_parent
from r1hpc.submission.submit_chain import SubmittedChain, submit_chain
from research.ablation.arms import ABLATIONS, Ablation, Arm, Settings, choose_arms

USUAL_JOB = "r1"
"""The chain file whose stages an ablation takes where none is named."""
KINDS = ("traces", "sft", "rl")
"""The stages that an ablation takes from a chain file; KIND:KEY=VALUE overrides one of them."""
_PLACES = ("resources.", "cluster.", "limits.", "monitor.", "checkpoint.")
"""Place and way in which a stage runs, which may change from one submission to the next."""
_SEEDED = ("train", "data", "task")

Layer = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One ablation in its folder, resolved."""

    path: Path
    ablation: Ablation
    arms: tuple[Arm, ...]
    refused: Mapping[str, str]
    base: Mapping[str, Layer]
    """By kind: a stage, resolved, with the overrides in it, before arm and seed."""
    overrides: tuple[str, ...]
    """Those that say what is trained."""
    notes: tuple[str, ...] = ()
    job: str = ""
    """The job file's name, where it is not the usual one."""

    def chain(self, seed: int) -> ChainDir:
        return ChainDir(self.path / f"seed{seed}")

    def layer(self, kind: str, settings: Settings, seed: int) -> Layer:
        """A stage of one arm and one seed, before the paths between stages."""
        layer = copy.deepcopy(self.base[kind])
        for key, value in {**settings, **{f"{section}.seed": seed for section in _SEEDED}}.items():
            *sections, last = key.split(".")
            functools.reduce(operator.getitem, sections, layer)[last] = value
        return layer

    def cold_start(self, arm: Arm, seed: int) -> str:
        """The name of the stage, by all that its weights follow from: equal ones are shared."""
        layers = [self.layer("traces", {}, seed), self.layer("sft", arm.sft, seed)]
        content = json.dumps([_what_is_trained(layer) for layer in layers], sort_keys=True)
        return f"sft-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @property
    def given_start(self) -> str | None:
        """The weights that every arm starts from, where rl:model.path names some."""
        path: str | None = self.base["rl"]["model"]["path"]
        return path


def open_study(
    path: Path,
    name: str,
    job: Path,
    overrides: Sequence[str],
    arms: Sequence[str] | None,
    places: Sequence[str] = (),
    cluster: str | None = None,
    every: int = 0,
) -> Study:
    """The study of a folder, which need not exist: as its study.json says, else as asked.

    Args:
        overrides: KEY=VALUE for every stage, KIND:KEY=VALUE for those of a kind; none about resources.
        arms: names; None: those it was begun with, in a new one all that the hardware can run.
        places: overrides about resources: what hardware that is.
        cluster: name of a profile.
        every: steps between evaluations; 0: only before the first and after the last.

    Raises:
        UsageError: it is there with another ablation, other arms or other overrides.
    """
    ablation = ABLATIONS[name]
    base = base_stages(job, overrides, every)
    hardware = load.merge_layers([base["rl"]], overrides_of_kind("rl", places), cluster)
    choice = choose_arms(ablation, arms, hardware)
    known = read_json(_record(path)) if _record(path).is_file() else None
    if arms is None and known is not None and known.get("ablation") == name:  # there may be more by now
        choice = replace(choice, arms=tuple(arm for arm in choice.arms if arm.name in known["arms"]))
    own = "" if job == find_job(USUAL_JOB) else job.stem
    study = Study(path, ablation, choice.arms, choice.refused, base, tuple(overrides), job=own)
    if study.given_start is not None and any(arm.sft for arm in choice.arms):
        raise UsageError(f"the arms of {name} differ in their cold starts: leave rl:model.path out")
    if known is None:
        return study
    asked = _as_record(study)
    for key in ("ablation", "arms", "overrides"):
        if known.get(key) != asked[key]:
            before, now = printable(_said(known.get(key))), printable(_said(asked[key]))
            raise UsageError(
                f"{path} was begun with {key} {before}, not {now}: ask for it as it was, or take another "
                "--run-name"
            )
    if known.get("base") == asked["base"]:
        return study
    if (before := known.get("every", 0)) != every:
        raise UsageError(
            f"{path} was begun with --every {before}: ask for it as it was, or take another --run-name"
        )
    note = f"{job} has changed since {path.name} was begun: it goes on as it was"
    return replace(study, base=known["base"], notes=(note,))


def base_stages(job: Path, overrides: Sequence[str], every: int = 0) -> dict[str, Layer]:
    """By kind, the first stage of it in a chain file, with the overrides, untied from other stages.

    Raises:
        ConfigError: the file has no such stage, or an override is wrong.
        UsageError: an override for a kind that is not there.
    """
    content = load.read_yaml(job)
    common = load.layers_of({key: value for key, value in content.items() if key != "stages"}, job)
    found: dict[str, Layer] = {}
    for item in content.get("stages") or ():
        own = {key: value for key, value in item.items() if key not in ("name", "needs")}
        kind = own.get("stage")
        if kind in KINDS and kind not in found:
            layers = [_without_references(layer) for layer in (*common, *load.layers_of(own, job))]
            config = load.merge_layers(layers, overrides_of_kind(kind, overrides))
            found[kind] = load.as_layer(replace(config, evaluate=replace(config.evaluate, every=every)))
    missing = [kind for kind in KINDS if kind not in found]
    if missing:
        raise ConfigError(f"{job} has no stage of kind {', '.join(missing)}: an ablation needs all three")
    return found


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is trained, where it runs): only the second may change from one call to the next."""
    places = [item for item in overrides if without_stage(item).startswith(_PLACES)]
    return [item for item in overrides if item not in places], places


def overrides_of_kind(kind: str, overrides: Sequence[str]) -> list[str]:
    """The overrides for one kind of stage: those for all, and its own.

    Raises:
        UsageError: one for a kind that an ablation does not have.
    """
    found = []
    for item in overrides:
        plain = without_stage(item)
        named = item[: len(item) - len(plain)].rstrip(":")
        if named and named not in KINDS:
            raise UsageError(
                f"{printable(item)!r}: an ablation has the kinds of stage {', '.join(KINDS)}, as in "
                "rl:train.num_steps=40"
            )
        if not named or named == kind:
            found.append(plain)
    return found


def submit_seed(study: Study, seed: int, order: Order, places: Sequence[str] = ()) -> SubmittedChain:
    """Begin or go on with the chain of one seed. A dry run writes nothing that stays.

    Args:
        places: overrides about resources.

    Raises:
        UsageError: a stage cannot be as described.
        R1hpcError: Slurm refused, or does not answer.
    """
    chain = study.chain(seed)
    if chain.definition.is_file():
        # One that is being worked on is left alone, whatever is said of its resources.
        changed = () if supervisor_pid(chain) is not None else _for_stages(_frozen_stages(chain), places)
        return submit_chain(chain, None, replace(order, overrides=changed))
    stages = chain_stages(study, seed)
    order = replace(order, overrides=_for_stages({s["name"]: s["stage"] for s in stages}, places))
    source = study.path / f"seed{seed}.yaml"
    if order.purpose is not Purpose.dry_run:
        _write_study(study)
        write_yaml(source, {"stages": stages})
        return submit_chain(chain, source, order)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / source.name
        write_yaml(source, {"stages": stages})
        return submit_chain(chain, source, order)


def chain_stages(study: Study, seed: int) -> list[Layer]:
    """The stages of a seed's chain: the cold starts that nobody has finished yet, then the arms."""
    starts: list[Layer] = []
    models: dict[str, str] = {}
    for arm in study.arms:
        name = study.cold_start(arm, seed)
        if study.given_start is None and name not in models:
            finished = finished_cold_start(study, name, seed)
            models[name] = str(finished.model) if finished else f"${{stage:{name}}}/model"
            starts += [] if finished else [_sft(study, arm, seed, name)]
    if starts:
        starts.insert(0, {"name": "traces", "needs": [], **study.layer("traces", {}, seed)})
    return [*starts, *(_rl(study, arm, seed, models) for arm in study.arms)]


def finished_cold_start(study: Study, name: str, seed: int) -> RunDir | None:
    """A finished stage of that name and seed in any ablation beside this one."""
    for path in sorted(study.path.parent.glob(f"*/seed{seed}/{name}/FINISHED")):
        return RunDir(path.parent)
    return None


def _sft(study: Study, arm: Arm, seed: int, name: str) -> Layer:
    layer = study.layer("sft", arm.sft, seed)
    layer["data"] |= {"traces": ["${stage:traces}/traces.jsonl"], "path": None}
    return {"name": name, "needs": ["traces"], **layer}


def _rl(study: Study, arm: Arm, seed: int, models: Mapping[str, str]) -> Layer:
    name = study.cold_start(arm, seed)
    layer = study.layer("rl", arm.rl, seed)
    layer["model"]["path"] = study.given_start or models[name]
    needs = [name] if models.get(name, "").startswith("$") else []
    return {"name": check_name(arm.name, "arm"), "needs": needs, **layer}


def _for_stages(kinds: Mapping[str, str], overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides by kind, as the overrides by stage that a chain takes."""
    return tuple(
        f"{name}:{item}" for name, kind in kinds.items() for item in overrides_of_kind(kind, overrides)
    )


def _frozen_stages(chain: ChainDir) -> dict[str, str]:
    return {stage.name: stage.config.stage for stage in open_definition(chain).stages}


def _without_references(layer: Layer) -> Layer:
    """A layer without the paths that name another stage: an ablation ties its own."""

    def kept(section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        return {key: value for key, value in section.items() if "${stage:" not in str(value)}

    return {key: kept(section) for key, section in layer.items()}


def _what_is_trained(layer: Layer) -> Layer:
    """The sections of a stage from which its result follows."""
    sections = ("task", "generate") if layer["stage"] == "traces" else ("model", "data", "train", "task")
    found = {section: dict(layer[section]) for section in sections}
    form = layer["reward"]["answer_in"]
    if layer["stage"] == "traces" and form != RewardConfig().answer_in:  # demonstrations are in this form
        found["answer_in"] = form
    if found.get("model", {}).get("attn_implementation") == "softmax":
        found["model"]["attn_implementation"] = "sdpa"  # the same by another name
    return found


def _record(path: Path) -> Path:
    return path / "study.json"


def _as_record(study: Study) -> dict[str, Any]:
    return {
        "ablation": study.ablation.name,
        "arms": [arm.name for arm in study.arms],
        "overrides": list(study.overrides),
        "every": study.base["rl"]["evaluate"]["every"],
        "base": json.loads(json.dumps(study.base)),
    }


def _write_study(study: Study) -> None:
    if _record(study.path).is_file():
        return
    create_parent(RunDir(study.path))
    study.path.mkdir(mode=0o700, exist_ok=True)
    write_json(_record(study.path), _as_record(study))


def _said(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
