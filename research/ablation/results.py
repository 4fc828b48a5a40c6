"""Collect the results of an ablation: read from the run folders of its arms, or from a file written before.

found = read_results(study, seeds=(0, 1, 2))
found.arm("rule").values("pass_at_1")       # {seed: value} of the finished ones
Results.from_json(read_json(path)) == found
"""

import datetime
import os
import platform
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.base.files import iter_records
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import read_steps
from research.ablation.arms import Arm
from research.ablation.study import Study, finished_cold_start

_LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Outcome:
    """One arm of one seed, finished. Shares and accuracies are of samples at the rollout's temperature."""

    seed: int
    num_steps: int
    num_items: int
    """Held-out items of the evaluation."""
    greedy_before: float
    greedy: float
    pass_at_1_before: float
    pass_at_1: float
    pass_at_n: float
    """n is `num_samples`."""
    num_samples: int
    response_length: float
    thinking_share_before: float
    thinking_share: float
    accuracy_given_thinking_before: float | None
    """After the cold start, before reinforcement learning. None: nothing thinks."""
    num_completions: int
    """Sampled for training."""
    step_time_s: float
    """Median over the steps."""
    wall_s: float
    """All attempts of the arm's own stage, with start, evaluations and saves."""
    cold_start_s: float | None
    """Its cold start, which other arms may share. None: not known here."""
    curve: tuple[tuple[int, float], ...] = ()
    """pass@1 of the held-out items by step, the cold start's first. Empty: of an older version."""

    def steps_to(self, mark: float) -> float | None:
        """Steps until pass@1 was `mark`, on the line between two evaluations; None: it never was."""
        if self.curve and self.curve[0][1] >= mark:
            return 0.0
        for (before, low), (after, high) in pairwise(self.curve):
            if high >= mark:
                return before + (after - before) * (mark - low) / (high - low)
        return None


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds."""

    name: str
    words: str
    outcomes: tuple[Outcome, ...]

    def values(self, key: str) -> dict[int, float]:
        """By seed, where there is a value."""
        found = {outcome.seed: getattr(outcome, key) for outcome in self.outcomes}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def steps_to(self, mark: float) -> dict[int, float]:
        """By seed, where the mark was reached."""
        found = {outcome.seed: outcome.steps_to(mark) for outcome in self.outcomes}
        return {seed: steps for seed, steps in found.items() if steps is not None}


@dataclass(frozen=True)
class Results:
    """An ablation as far as it has come; the first arm is the baseline."""

    ablation: str
    question: str
    seeds: tuple[int, ...]
    """Asked for."""
    arms: tuple[ArmResult, ...]
    refused: dict[str, str]
    provenance: dict[str, Any]
    """command, date, machine, versions, task, overrides."""

    @property
    def num_finished(self) -> int:
        return sum(len(arm.outcomes) for arm in self.arms)

    @property
    def num_wanted(self) -> int:
        return len(self.arms) * len(self.seeds)

    def arm(self, name: str) -> ArmResult:
        """The arm of that name; one that was not asked for has no outcomes."""
        return next((arm for arm in self.arms if arm.name == name), ArmResult(name, "not run", ()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Results":
        """The object that to_json gave.

        Raises:
            StateError: it is from another version.
        """
        try:
            arms = tuple(
                ArmResult(arm["name"], arm["words"], tuple(map(_outcome, arm["outcomes"])))
                for arm in value["arms"]
            )
            return Results(**{**value, "arms": arms, "seeds": tuple(value["seeds"])})
        except (KeyError, TypeError) as error:
            raise StateError(f"results of an ablation by another version of r1hpc ({error!r})") from None


def _outcome(value: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**value, "curve": tuple((step, share) for step, share in value.get("curve", ()))})


def read_results(study: Study, seeds: Sequence[int], places: Sequence[str] = ()) -> Results:
    """The finished arms of a study.

    Args:
        places: overrides about resources, for the record.
    """
    arms = tuple(
        ArmResult(
            arm.name, arm.words, tuple(found for seed in seeds if (found := read_outcome(study, arm, seed)))
        )
        for arm in study.arms
    )
    provenance = _provenance(study, seeds, places)
    ablation = study.ablation
    return Results(ablation.name, ablation.question, tuple(seeds), arms, dict(study.refused), provenance)


def read_outcome(study: Study, arm: Arm, seed: int) -> Outcome | None:
    """One arm of one seed; None: it is not finished."""
    run = study.chain(seed).stage(arm.name)
    if not run.finished.exists() or not run.config.is_file():
        return None
    config = load.read(run.config)
    evaluations = {line["global_step"]: line for line in iter_records(run.metrics / "evaluation.jsonl")}
    before, after = evaluations.get(0), evaluations.get(config.train.num_steps)
    if before is None or after is None:
        raise StateError(
            f"{run.path} is finished, but its metrics/evaluation.jsonl lacks the first or the last "
            "evaluation: remove its FINISHED and run the ablation again"
        )
    steps = read_steps(run)
    start = study.chain(seed).stage(study.cold_start(arm, seed))
    start = start if start.finished.exists() else finished_cold_start(study, start.run_id, seed) or start
    return Outcome(
        seed=seed,
        num_steps=config.train.num_steps,
        num_items=after["num_items"],
        greedy_before=before["greedy"]["value"],
        greedy=after["greedy"]["value"],
        pass_at_1_before=before["pass_at"]["1"]["value"],
        pass_at_1=after["pass_at"]["1"]["value"],
        pass_at_n=after["pass_at"][max(after["pass_at"], key=int)]["value"],
        num_samples=int(max(after["pass_at"], key=int)),
        response_length=after["response_length"],
        thinking_share_before=before["thinking_share"],
        thinking_share=after["thinking_share"],
        accuracy_given_thinking_before=before["accuracy_given_thinking"],
        num_completions=sum(
            step.value("num_items") * config.rollout.num_generations
            for step in steps.effective.values()
            if step.value("update") == 0
        ),
        step_time_s=statistics.median(steps.column("step_time_s")),
        wall_s=_wall_s(run),
        cold_start_s=_wall_s(start) if start.finished.exists() else None,
        curve=tuple((step, line["pass_at"]["1"]["value"]) for step, line in sorted(evaluations.items())),
    )


def _wall_s(run: RunDir) -> float:
    return sum((a.end or a.start) - a.start for a in read_history(run).attempts)


def _provenance(study: Study, seeds: Sequence[int], places: Sequence[str]) -> dict[str, Any]:
    """Enough to run it again, and nothing about where its files lie."""
    runs = [study.chain(seed).stage(arm.name) for seed in seeds for arm in study.arms]
    finished = [run for run in runs if run.finished.exists()]
    ends = [attempt.end for run in finished for attempt in read_history(run).attempts if attempt.end]
    base = study.base["rl"]
    return {
        "command": _command(study, seeds, places),
        "date": datetime.datetime.fromtimestamp(max(ends), datetime.UTC).date().isoformat() if ends else None,
        "machine": _machine(load.read(finished[0].config)) if finished else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "task": base["task"]["name"],
        "overrides": [*study.overrides, *places],
    }


def _command(study: Study, seeds: Sequence[int], places: Sequence[str]) -> str:
    has_all = len(study.arms) + len(study.refused) == len(study.ablation.arms)
    arms = () if has_all else ("--arms", ",".join(arm.name for arm in study.arms[1:]))
    every = study.base["rl"]["evaluate"]["every"]
    job = [study.job] if study.job else []
    evaluations = ["--every", str(every)] if every else []
    words = [study.ablation.name, *job, "--seeds", str(len(seeds)), *evaluations, *arms]
    words += [*study.overrides, *places]
    return f"python -m research.ablation {shlex.join(words)}"


def _machine(config: RunConfig) -> str:
    """Return the machines of the arms, as text."""
    resources = config.resources
    if resources.gpus_per_node != 0:
        kind = config.cluster.gpu_type or "GPUs of a kind that nobody named"
        return f"{resources.nodes} node(s) with {resources.gpus_per_node} x {kind}"
    ranks = resources.nodes * resources.ranks_per_node
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {ranks} rank(s), no GPU"


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
