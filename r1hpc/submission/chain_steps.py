"""Decide what each stage of a chain needs next (`plan_steps`), and submit it on Slurm.

Finished stages are skipped, running ones left alone; stopped, cancelled or failed ones are resumed, and the
others submitted. Each job waits by `afterok` for those of the stages it needs. A kill between sbatch and the
record of its answer leaves a job that `jobs_by_folder` finds; it is adopted.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from r1hpc.attempt.state.state import State, read_situation, slurm_jobs
from r1hpc.attempt.workload import workload_of
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.run_dir import RunDir
from r1hpc.config import paths
from r1hpc.config.paths import local_folder
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import trains
from r1hpc.plan.model.shape import load_model_config
from r1hpc.slurm import defaults, queue
from r1hpc.slurm.client import call
from r1hpc.submission import start_run
from r1hpc.submission.chain.file import Definition, Stage, overrides_of
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import OrderFacts, PlannedRun
from r1hpc.submission.resume import plan_inside


class Action(StrEnum):
    """Action of a call on a stage of a chain, or on a point of a sweep."""

    skip = "finished"
    drop = "stopped at a rung"
    leave = "at work"
    adopt = "found again"
    """It has a job that was not recorded."""
    submit = "submitted"
    resume = "resumed"
    renew = "submitted again"
    """Its job waits for one that is over and never began: it is cancelled for a new one."""

    @property
    def makes_a_job(self) -> bool:
        return self in (Action.submit, Action.resume, Action.renew)


@dataclass(frozen=True)
class StageStep:
    stage: Stage
    run: RunDir
    action: Action
    planned: PlannedRun | None = None
    """Set if the stage gets a job."""
    job_id: str | None = None


def plan_steps(
    chain: ChainDir, definition: Definition, order: Order, reused: Collection[str] = ()
) -> tuple[StageStep, ...]:
    """Return the action for each stage, in order, after every check that needs no job.

    Raise UsageError if a stage cannot be submitted as described, or is running elsewhere. Raise SlurmError if
    Slurm must be asked for unrecorded jobs, and does not answer.
    """
    begun = any(chain.stage(name).config.is_file() for name in definition.names)
    may_be_lost = order.executor == "slurm" and not order.is_dry_run and begun
    unrecorded = queue.jobs_by_folder() if may_be_lost else {}
    ask = functools.cache(defaults.ask_cluster)  # once for all stages that go to the same place
    models: dict[str, dict[str, Any]] = {}
    tokenizers: dict[str, str | None] = {}
    steps: dict[str, StageStep] = {}
    for stage in definition.stages:
        try:
            others = {
                chain.stage(other.name).path: other.config
                for other in definition.stages
                if other is not stage
            }
            own = overrides_of(stage.name, order.overrides, definition.names, chain)
            tokenizers[stage.name] = _tokenizer_folder(stage, chain, tokenizers)
            facts = OrderFacts(
                chain.stage(stage.name),
                others=others,
                expected_model=_expected(stage.config.model.path, chain, models),
                expected_teacher=_expected(stage.config.rl.teacher, chain, models),
                tokenizer_folder=tokenizers[stage.name],
                order=replace(order, overrides=tuple(own)),
            )
            _refuse_unwritten_paths(stage, definition, chain)
            if _leaves_model(stage.config):
                vocab_size = workload_of(stage.config.stage).vocab_size(stage.config)
                models[stage.name] = load_model_config(stage.config, vocab_size, facts.expected_model)
            if stage.name in reused:
                steps[stage.name] = StageStep(stage, facts.run, Action.skip)
                continue
            step = _choose(facts.run, stage, unrecorded, steps, order)
            if step.action.makes_a_job:
                config = stage.config if step.action is Action.submit else None
                planned = plan_inside(chain.name, config, facts, ask)
                step = replace(step, planned=replace(planned, needs=stage.needs))
        except UsageError as error:
            raise UsageError(f"stage {stage.name}: {error}") from None
        steps[stage.name] = step
    return tuple(steps.values())


def carry_out_on_slurm(chain: ChainDir, steps: Sequence[StageStep], order: Order) -> dict[str, str]:
    """Submit the stages, each tied to those it needs; return the job IDs of the unfinished stages.

    Raise R1hpcError if Slurm refuses a stage; those before it are submitted, and the message says so.
    """
    jobs: dict[str, str] = {}
    for step in steps:
        name = step.stage.name
        if step.action is Action.adopt and step.job_id is not None:
            start_run.adopt(step.run, step.job_id)
            chain.record("submitted", stage=name, job_id=step.job_id, executor="slurm", adopted=True)
        if step.job_id is not None and not step.action.makes_a_job:
            jobs[name] = step.job_id
        elif step.action.makes_a_job:
            try:
                jobs[name] = _submit(chain, step, jobs, order)
            except R1hpcError as error:
                raise _interrupted(error, name, jobs, order.overrides) from None
    return jobs


def _choose(
    run: RunDir,
    stage: Stage,
    unrecorded: Mapping[Path, list[str]],
    steps: Mapping[str, StageStep],
    order: Order,
) -> StageStep:
    if not run.config.is_file():
        if run.path.is_symlink() and not run.path.exists():
            raise UsageError(f"its reused stage is gone: {run.path.readlink()}; take another --run-name")
        return StageStep(stage, run, Action.submit)
    situation = read_situation(run)
    if situation.state is State.finished:
        return StageStep(stage, run, Action.skip)
    job = situation.job
    if situation.state.is_at_work and job is not None:
        if job.is_slurm != (order.executor == "slurm"):
            where = "in Slurm" if job.is_slurm else "on a machine of its own"
            raise UsageError(
                f"it is {situation.state} {where} as {job.job_id}: go on with the executor "
                "it was submitted with, or cancel the chain first"
            )
        waits_in_vain = any(steps[name].action.makes_a_job for name in stage.needs)
        pending = order.executor == "slurm" and situation.state is State.queued
        action = Action.renew if pending and waits_in_vain else Action.leave
        return StageStep(stage, run, action, job_id=job.job_id)
    lost = [job_id for job_id in unrecorded.get(run.path, ()) if job_id not in slurm_jobs(run)]
    if lost:
        return StageStep(stage, run, Action.adopt, job_id=lost[-1])
    return StageStep(stage, run, Action.resume)


def _refuse_unwritten_paths(stage: Stage, definition: Definition, chain: ChainDir) -> None:
    """Refuse a missing path in another stage's folder that the other stage will not write either."""
    named = [("model.path", stage.config.model.path), ("rl.teacher", stage.config.rl.teacher)]
    named += [("data.traces", path) for path in stage.config.data.traces]
    for key, path in named:
        if path is None or Path(path).exists():
            continue
        for other in definition.stages:
            folder = chain.stage(other.name).path
            if not Path(path).is_relative_to(folder):
                continue
            left: tuple[str, ...] = ("traces.jsonl",) if other.config.stage in ("traces", "generate") else ()
            left = ("model",) if _leaves_model(other.config) else left
            if str(Path(path).relative_to(folder)) not in left:
                what = f"{' and '.join(left)} alone" if left else "neither a model nor traces"
                is_script = other.config.stage == "script"
                hint = "; set its model.path to the model it begins from" * is_script
                raise UsageError(
                    f"{key}={path}: stage {other.name} ({other.config.stage}) leaves {what}{hint}"
                )


def _leaves_model(config: RunConfig) -> bool:
    """True for a stage that trains; a script counts if it names the model it begins from."""
    is_told = config.stage == "script" and bool(config.model.path or config.model.config)
    return trains(config.stage) or is_told


def _expected(
    path: str | None, chain: ChainDir, models: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the config.json that a stage of the chain will write at `path` or above, if one will."""
    if path is None:
        return None
    return next((models[name] for name in models if Path(path).is_relative_to(chain.stage(name).path)), None)


def _tokenizer_folder(stage: Stage, chain: ChainDir, of_others: Mapping[str, str | None]) -> str | None:
    """Return the folder whose tokenizer and chat template a stage uses and hands on; None if unknown here,
    as after pretraining, which hands on its dataset's."""
    model = stage.config.model
    if model.path is None or model.tokenizer is not None or paths.has_own_template(model):
        return None
    if stage.config.stage == "pretrain":
        return None
    written_by = (name for name in of_others if Path(model.path).is_relative_to(chain.stage(name).path))
    name = next(written_by, None)
    return str(Path(local_folder(model.path)).absolute()) if name is None else of_others[name]


def _submit(chain: ChainDir, step: StageStep, jobs: Mapping[str, str], order: Order) -> str:
    name, planned = step.stage.name, step.planned
    assert planned is not None, "plan_steps plans what gets a job"
    if step.action is Action.renew and step.job_id is not None:
        call(["scancel", "--state=PENDING", step.job_id], 20.0)
    start_run.clear_incomplete(step.run)
    waited_for = [jobs[need] for need in step.stage.needs if need in jobs]
    tied = queue.after_all_ok(waited_for, planned.config.resources.dependency)
    chain.record("submitting", stage=name)
    failpoint("chain.submitting")
    job_id = start_run.start(replace(planned, script=planned.script.with_options(tied)), order)
    chain.record("submitted", stage=name, job_id=job_id, executor="slurm")
    failpoint("chain.submitted")
    return job_id


def _interrupted(
    error: R1hpcError, name: str, jobs: Mapping[str, str], settings: Sequence[str]
) -> R1hpcError:
    before = ", ".join(f"{stage} as job {job}" for stage, job in jobs.items())
    again = "Submit the chain again, with the same settings," if settings else "Submit the chain again"
    hint = f"\nsubmitted before it: {before}. {again} to go on" if before else ""
    kind = type(error) if type(error) in (R1hpcError, UsageError) else R1hpcError
    return kind(f"stage {name}: {error}{hint}")
