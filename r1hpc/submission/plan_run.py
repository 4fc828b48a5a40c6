"""Plan one run or one stage of a chain: decide and check everything, write nothing.

planned = plan_new_run(order)                     # the job file on a new run
planned = plan_resumed_run(order)                 # an existing run, with other nodes or more steps
planned = plan_run(run, config, order)            # called by both, and for a stage of a chain
planned.plan, planned.script, planned.estimate
estimate, notes = estimate_for(run_root, config, plan)     # as in estimate.json; None: unknown
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.calibrate import Site, corrected, finished_runs
from r1hpc.attempt.state.state import read_situation
from r1hpc.attempt.workload import Facts, workload_of
from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_object
from r1hpc.base.lock import is_free
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.config import load, plugins, snapshot
from r1hpc.config.packages import check_packages
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import TRAINED_STAGES
from r1hpc.plan.hours.workload import ASSUMED_GPU
from r1hpc.plan.memory.run import asked_host_gib, misfits
from r1hpc.plan.run import RunPlan
from r1hpc.plan.topology.gpus import (
    FLAGS_INSTEAD,
    UnknownGpuError,
    find_gpu,
    gpu_type_of,
    other_card,
    smaller_cards,
)
from r1hpc.slurm import defaults, fields, flags, script
from r1hpc.slurm.probe import ClusterFacts
from r1hpc.slurm.sbatch import withheld
from r1hpc.submission.advice import kept_from_before, little_room
from r1hpc.submission.order import DEFAULT_JOB, Order, Purpose
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.ranks import measured_save_speed
from r1hpc.telemetry.trackers.check import check_trackers

ASSUMED_GPUS_PER_NODE = 8
"""Used if nothing says how many a node has, and no cluster is asked."""
_MAY_CHANGE_SECTIONS = (
    *("resources.", "cluster.", "limits.", "monitor.", "checkpoint."),
    "rollout.vllm_options.",  # memory and speed
)
_MAY_CHANGE_KEYS = (
    *("train.num_steps", "train.print_every", "train.hang_timeout_s", "deepspeed.zero_stage"),
    # The same samples in the same batches; only the order of sums changes.
    *("train.sequence_parallel", "train.micro_batch_size", "train.gradient_accumulation_steps"),
    *("rollout.max_prompt_length", "rollout.prompts_per_batch", "rl.reference", "train.logits_chunk_tokens"),
    # Limits and checks that change no number.
    *("rollout.max_logprob_difference", "rollout.prove_every"),
    *("train.max_skipped_steps", "train.stop_grad_norm"),
    "data.mix.schedule",  # its past part is compared with the checkpoint
)


def estimate_for(
    run_root: Path, config: RunConfig, plan: RunPlan, expected_model: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the hours of a run, corrected by what this site's finished runs really took.

    Args:
        expected_model: the config.json that an earlier stage of a chain will leave in model.path.

    Returns:
        Estimate.to_json(), with `uncorrected` and `correction` added if it was corrected; and notes.
    """
    try:
        found = workload_of(config.stage).estimate(
            config, plan, expected_model=expected_model, run_root=run_root
        )
    except UnknownGpuError as error:
        said = str(error).replace(FLAGS_INSTEAD, "set cluster.gpu_type to")
        return None, (f"no estimate: {said}",)
    if found is None:
        return None, ()
    found, correction = corrected(found, config.stage, _site(run_root.absolute()))
    return {**found.to_json(), **correction}, ()


@functools.cache
def _site(run_root: Path) -> Site:
    """Read every finished run, once for all stages of a submission."""
    return finished_runs(run_root)


@dataclass(frozen=True)
class PlannedRun:
    """Everything that is decided before the first file is written."""

    run: RunDir
    executor: str
    """slurm or local."""
    config: RunConfig
    """Complete: nothing is left open."""
    plan: RunPlan
    script: script.Script
    notes: tuple[str, ...]
    """Sentences for the person: assumptions, the warning before a kill, what could not be found out."""
    is_new: bool = True
    """The run folder does not exist yet."""
    estimate: dict[str, Any] | None = None
    """Estimated cost, as in estimate.json; None: unknown."""
    needs: tuple[str, ...] | None = None
    """The stages of a chain that must be finished before this one begins."""
    prompt: str | None = None
    """A prompt in the form the model will see; None: it sees none, or the form is not known yet."""


def plan_new_run(order: Order) -> PlannedRun:
    """Plan a run that does not exist yet.

    Raises:
        UsageError: it exists.
    """
    config = load.load(order.job or DEFAULT_JOB, order.overrides, order.cluster)
    run = order.new_run()
    if is_leftover(run):
        raise UsageError(
            f"a submission that was cut off has left {run.path}, without submitting anything: remove it, "
            "or choose another --run-name"
        )
    if os.path.lexists(run.path):
        raise UsageError(
            f"there is a run called {run.run_id} in {run.path.parent}: continue it with --resume, "
            "or choose another --run-name"
        )
    return plan_run(run, config, order)


def is_leftover(run: RunDir) -> bool:
    """True if a submission that was cut off while it froze the run left the folder without a job."""
    try:
        is_whole = run.config.exists() or run.attempts.exists()
        return not is_whole and run.submission_lock.is_file() and is_free(run.submission_lock)
    except OSError:  # another user's
        return False


def plan_resumed_run(order: Order) -> PlannedRun:
    """Plan an existing run: its frozen code and configuration, with other resources or more steps.

    Raises:
        UsageError: it is running or finished, or the overrides would make it another run.
    """
    run = open_run(order.resumed_run().path)
    now = read_situation(run)
    if now.state.is_at_work:
        job = now.job.job_id if now.job else "?"
        raise UsageError(f"{run.run_id} is {now.state} as job {job}: cancel it first, or touch {run.stop}")
    config = reconfigured(run, order)
    frozen = load.read(run.config)
    if run.finished.exists() and config.stage == "serve":
        raise UsageError(
            f"{run.run_id} is a server that ended, at its time limit or idle: start another one with "
            f"`python -m r1hpc.serve {config.model.path}`"
        )
    if run.finished.exists() and config.stage not in TRAINED_STAGES:
        raise UsageError(f"{run.run_id} is finished and cannot be extended: start another run")
    if run.finished.exists() and _was_stopped_early(run, frozen):
        raise UsageError(
            f"{run.run_id} was ended by train.early_stopping, and its model is {run.model}: to train on, "
            f"begin another run from it, model.path={run.model}"
        )
    if run.finished.exists() and config.train.num_steps <= frozen.train.num_steps:
        raise UsageError(
            f"{run.run_id} is finished; to train on, give train.num_steps={frozen.train.num_steps * 2}"
        )
    planned = plan_run(run, config, order, is_new=False)
    given = [item for item in (*_set_for_the_cluster(run), *order.overrides) if item.startswith("cluster.")]
    kept = kept_from_before(config, load.profile_layer(order.cluster), given)
    return replace(planned, notes=(*planned.notes, *kept))


def _was_stopped_early(run: RunDir, config: RunConfig) -> bool:
    last_step = read_object(run.finished).get("global_step")
    return (
        bool(config.train.early_stopping)
        and isinstance(last_step, int)
        and last_step < config.train.num_steps
    )


def plan_run(
    run: RunDir,
    config: RunConfig,
    order: Order,
    *,
    facts: ClusterFacts | None = None,
    expected_model: Mapping[str, Any] | None = None,
    expected_teacher: Mapping[str, Any] | None = None,
    tokenizer_folder: str | None = None,
    to_come: Sequence[Path] = (),
    is_new: bool = True,
) -> PlannedRun:
    """Check the configuration, ask the cluster, plan, write the script's text, and estimate.

    Args:
        facts: about the cluster, if already known.
        expected_model: the config.json that an earlier stage will leave in model.path.
        expected_teacher: the same for rl.teacher.
        tokenizer_folder: the tokenizer and chat template that stage will hand on, if known.
        to_come: folders of other stages, whose outputs do not exist yet.
    """
    fields.check_cluster(config.cluster)
    fields.check_resources(config.resources)
    fields.check_parents(run.path, config.cluster.trust_shared_run_root)
    if is_new:
        for section in (config.deepspeed, config.rollout, config.rl):
            section.check_new()
    config = snapshot.with_absolute_paths(config)
    snapshot.refuse_secrets(config, order.overrides)
    known = Facts(
        run=run,
        frozen=None if is_new else load.read(run.config),
        to_come=to_come,
        expected_model=expected_model,
        expected_teacher=expected_teacher,
        tokenizer_folder=tokenizer_folder,
    )
    if not is_new:
        plugins.refuse_changes(plugins.names_in(config), run.code)
        plugins.refuse_changed_files(run.code)
    workload = workload_of(config.stage)
    checked = workload.check_settings(config, known)
    config = checked.config
    executor, notes = defaults.choose_executor(order.executor, will_submit=order.purpose is Purpose.start)
    notes += checked.notes
    check_trackers(config, executor)
    decision = defaults.decide(
        config,
        executor,
        vocab_size=workload.vocab_size(config),
        assumed_gpus_per_node=ASSUMED_GPUS_PER_NODE if order.is_dry_run else None,
        facts=facts,
        expected_model=expected_model,
        expected_teacher=expected_teacher,
        save_speed=measured_save_speed(order.counted_root, config.resources.nodes),
        has_nodes=order.purpose is Purpose.inside_job,
    )
    if executor == "slurm" and order.purpose is not Purpose.estimate:
        decision.refuse_missing_nodes()
    if order.purpose is not Purpose.estimate:
        try:
            check_packages(decision.config, executor, workload.packages)
        except UsageError as error:
            if not order.is_dry_run or defaults.slurm_is_here():
                raise
            notes.append(f"submit refuses this run here: {error}")  # a laptop need not have them
    known = replace(known, executor=executor, gpus_per_node=decision.gpus_per_node)
    advice = workload.check(decision.config, known)
    text = script.make_script(
        run, decision.config, gpus_per_node=decision.gpus_per_node, signal_lead_s=decision.signal_lead_s
    )
    estimate, no_estimate = estimate_for(order.counted_root, decision.config, decision.plan, expected_model)
    ignored = ", ".join(flags.ignored_variables(os.environ))
    notes += [f"not used from the environment: {ignored}"] if ignored else []
    if executor == "slurm" and (hidden := ", ".join(withheld(os.environ))):
        notes.append(
            f"not passed to the job, since the value holds a password or a token: {hidden}. Keep the login "
            "in ~/.netrc, or set the variable in a cluster.setup line that reads a file"
        )
    notes += [*decision.notes, *no_estimate, *_memory_notes(decision.config, decision.plan, is_new), *advice]
    if is_new:
        notes += little_room(run, decision.config, decision.plan)
    return PlannedRun(
        run,
        executor,
        decision.config,
        decision.plan,
        text,
        tuple(notes),
        is_new,
        estimate,
        prompt=checked.prompt,
    )


def _memory_notes(config: RunConfig, plan: RunPlan, is_new: bool) -> list[str]:
    """Return what exceeds the GPUs' memory or the memory requested of a node; for a new run also what would
    fit, and what would stay unused on a GPU."""
    if plan.memory is None or not plan.topology.num_gpus:
        return []
    try:
        card = find_gpu(gpu_type_of(config) or ASSUMED_GPU).memory_gib
    except UnknownGpuError:  # the estimate has reported it
        card = None
    # A resumed run can seldom change what would make it fit.
    memory = plan.memory if is_new else replace(plan.memory, way_out="", larger_cache="")
    unused = [memory.larger_cache] if memory.larger_cache and card is not None else []
    assumed = _assumed_card(config) if is_new and config.stage != "serve" else []
    return [*misfits(memory, gpu_gib=card, host_gib=asked_host_gib(config)), *unused, *assumed]


def _assumed_card(config: RunConfig) -> list[str]:
    """Return a note if memory and hours are planned for a GPU that the cluster may not have, or for another
    one than the profile names."""
    gpu_type = gpu_type_of(config)
    others = smaller_cards(gpu_type or ASSUMED_GPU.split("-")[0])
    if not others:
        return other_card(config)
    planned = find_gpu(gpu_type or ASSUMED_GPU)
    names = f"{planned.name.lower()} or {others[0].lower()}"
    return [
        *other_card(config),
        f"memory and hours are planned for {planned.name}: say which cards there are, "
        f"cluster.gpu_type={names}",
    ]


def reconfigured(run: RunDir, order: Order) -> RunConfig:
    """Return the frozen configuration of a run with the overrides of this order.

    Raises:
        UsageError: that would be another run.
    """
    earlier = [] if order.cluster else _set_for_the_cluster(run)
    # The warning time is chosen again for the time limit and the cluster of this submission.
    overrides = ["resources.signal_lead_s=null", *earlier, *order.overrides]
    frozen = load.read(run.config)
    config = load.merge_layers([load.as_layer(frozen)], overrides, order.cluster)
    config = snapshot.with_absolute_paths(config)
    wrong = forbidden_changes(frozen, config)
    if "task.first_item" in wrong and not read_history(run).attempts:
        wrong.remove("task.first_item")  # a chain's stage that still waits: no item was shown
    if wrong:
        may = ", ".join(key.rstrip(".") for key in (*_MAY_CHANGE_SECTIONS, *_MAY_CHANGE_KEYS))
        raise UsageError(
            f"--resume cannot change {', '.join(wrong)}: that would be another run. It may change {may}; for "
            "the rest take a new --run-name"
        )
    return config


def _set_for_the_cluster(run: RunDir) -> list[str]:
    """Return what earlier command lines set under `cluster.`: a resume reads the profile of $R1HPC_CLUSTER
    again, and those settings override it as they did then."""
    said = [item for event in read_history(run).submissions for item in event.get("overrides", ())]
    keys = {item.removeprefix(f"{run.path.name}:").partition("=")[0] for item in said}  # also a stage's
    frozen = load.as_layer(load.read(run.config))
    # Use their values as they took effect: a record is redacted, and a requested profile came after it.
    return [f"{key}={json.dumps(_at(frozen, key))}" for key in sorted(keys) if key.startswith("cluster.")]


def _at(layer: Mapping[str, Any], key: str) -> Any:
    value: Any = layer
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def forbidden_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Return the keys that differ and may not: a resumed run must see the same data in the same batches."""
    return [
        key
        for key in changed_keys(before, after)
        if not key.startswith(_MAY_CHANGE_SECTIONS) and key not in _MAY_CHANGE_KEYS
    ]


def changed_keys(before: RunConfig, after: RunConfig) -> list[str]:
    """Return the keys in which they differ."""
    a, b = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
