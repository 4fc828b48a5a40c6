"""Plan an existing run again: its frozen code and configuration, on other nodes or with more steps.

`forbidden_changes` lists the overrides that would make it another run. `plan_inside` plans a chain's stage or
a sweep's point, new or existing.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from r1hpc.attempt.state.state import read_situation
from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_object
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.config import load, paths
from r1hpc.config.layers import leaves, value_at
from r1hpc.config.other_names import is_removed
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import is_server, trains
from r1hpc.slurm import defaults
from r1hpc.slurm.probe import ClusterFacts
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import OrderFacts, PlannedRun, plan_run
from r1hpc.telemetry.records.attempts import read_history

AskCluster = Callable[..., ClusterFacts]
OF_THE_PLACE = ("resources.", "cluster.", "limits.", "monitor.", "notify.")
"""Sections that decide where and how long a run goes on, not what it leaves."""
_MAY_CHANGE_SECTIONS = (
    *OF_THE_PLACE,
    "checkpoint.",
    "rollout.vllm_options.",  # memory and speed
    "script.env.",
)
_MAY_CHANGE_KEYS = (
    *("train.num_steps", "train.print_every", "train.hang_timeout_s", "deepspeed.zero_stage"),
    # The same samples in the same batches; only the order of sums changes.
    *("train.sequence_parallel", "train.micro_batch_size", "train.gradient_accumulation_steps"),
    *("rollout.max_prompt_length", "rollout.prompts_per_batch", "rl.reference", "train.logits_chunk_tokens"),
    # Limits and checks that change no number.
    *("rollout.max_logprob_difference", "rollout.prove_every"),
    *("train.max_skipped_steps", "train.stop_grad_norm"),
    *("script.resume_args", "script.checkpoints", "script.steps", "script.stop_signal"),
    "script.python",
    "data.mix.schedule",  # its past part is compared with the checkpoint
)


def plan_resumed_run(order: Order) -> PlannedRun:
    """Plan an existing run: its frozen code and configuration, with other resources or more steps.

    Raise UsageError if it is running or finished, or the overrides would make it another run.
    """
    run = open_run(order.resumed_run().path)
    now = read_situation(run)
    if now.state.is_at_work:
        job = now.job.job_id if now.job else "?"
        raise UsageError(f"{run.run_id} is {now.state} as job {job}: cancel it first, or touch {run.stop}")
    config = reconfigured(run, order)
    frozen = load.read(run.config)
    if run.finished.exists():
        if is_server(config.stage):
            raise UsageError(
                f"{run.run_id} is a server that ended, at its time limit or idle: start another one with "
                f"`python -m r1hpc.serve {config.model.path}`"
            )
        if not trains(config.stage):
            raise UsageError(f"{run.run_id} is finished and cannot be extended: start another run")
        last_step = read_object(run.finished).get("global_step")
        is_short = isinstance(last_step, int) and last_step < frozen.train.num_steps
        if frozen.train.early_stopping and is_short:
            raise UsageError(
                f"{run.run_id} was ended by train.early_stopping, and its model is {run.model}: to train on, "
                f"begin another run from it, model.path={run.model}"
            )
        if config.train.num_steps <= frozen.train.num_steps:
            raise UsageError(
                f"{run.run_id} is finished; to train on, give train.num_steps={frozen.train.num_steps * 2}"
            )
    return plan_run(config, OrderFacts(run, frozen, order=order))


def plan_inside(parent: str, config: RunConfig | None, facts: OrderFacts, ask: AskCluster) -> PlannedRun:
    """Plan a stage of a chain or a point of a sweep; its job is called PARENT.NAME.

    Args:
        config: None: it exists, and keeps its frozen configuration under the order's overrides.
        ask: returns what Slurm says about the job's place.
    """
    if config is None:
        config = reconfigured(facts.run, facts.order)
        facts = replace(facts, frozen=load.read(facts.run.config))
    planned = plan_run(config, facts, ask(facts.order.executor, *defaults.place_in_cluster(config)))
    name = planned.config.resources.job_name or f"{parent}.{facts.run.run_id}"
    return replace(planned, script=planned.script.with_options({"job-name": name[:64]}))


def reconfigured(run: RunDir, order: Order) -> RunConfig:
    """Return the frozen configuration of a run with the overrides of this order.

    Raise UsageError if that would be another run.
    """
    earlier = [] if order.cluster else _set_for_the_cluster(run)
    # The warning time is chosen again for the time limit and the cluster of this submission.
    overrides = ["resources.signal_lead_s=null", *earlier, *order.overrides]
    layer = load.read_yaml(run.config)
    frozen = load.restore(layer)
    config = load.merge_layers([load.as_layer(frozen)], overrides, order.cluster)
    config = paths.with_absolute_paths(config)
    wrong = forbidden_changes(frozen, config)
    if "task.first_item" in wrong and not read_history(run).attempts:
        wrong.remove("task.first_item")  # a chain's stage that still waits: no item was shown
    if wrong:
        may = ", ".join(key.rstrip(".") for key in (*_MAY_CHANGE_SECTIONS, *_MAY_CHANGE_KEYS))
        raise UsageError(
            f"--resume cannot change {', '.join(wrong)}: that would be another run. It may change {may}; for "
            "the rest take a new --run-name"
        )
    unknown = [key for key in changed_keys(frozen, config) if not load.is_known(key, layer)]
    if unknown:
        raise UsageError(
            f"{run.run_id} goes on with its own code, which is older and has no {', '.join(unknown)}: leave "
            "that out, or take a new --run-name"
        )
    return config


def _set_for_the_cluster(run: RunDir) -> list[str]:
    """Return what earlier command lines set under `cluster.`: a resume reads the profile of $R1HPC_CLUSTER
    again, and those settings override it as they did then."""
    said = [item for event in read_history(run).submissions for item in event.get("overrides", ())]
    keys = {item.removeprefix(f"{run.path.name}:").partition("=")[0] for item in said}  # also a stage's
    frozen = load.as_layer(load.read(run.config))
    # Use their values as they took effect: a record is redacted, and a requested profile came after it.
    return [
        f"{key}={json.dumps(value_at(frozen, key))}"
        for key in sorted(keys)
        if key.startswith("cluster.") and not is_removed(key)
    ]


def forbidden_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Return the keys that differ and may not: a resumed run must see the same data in the same batches."""
    return [
        key
        for key in changed_keys(before, after)
        if not key.startswith(_MAY_CHANGE_SECTIONS) and key not in _MAY_CHANGE_KEYS
    ]


def changed_keys(before: RunConfig, after: RunConfig) -> list[str]:
    a, b = flat(before), flat(after)
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the values of a configuration by dotted keys."""
    return dict(leaves(dataclasses.asdict(config)))
