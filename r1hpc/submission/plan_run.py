"""One run, or one stage of a chain, planned: everything is decided and checked, nothing is written.

planned = plan_new_run(order)                     # the job file on a run that does not exist yet
planned = plan_resumed_run(order)                 # a run that does, with other nodes or more steps
planned = plan_run(run, config, order)            # both, and a stage of a chain, end here
planned.plan, planned.script, planned.estimate
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.attempt.state import look
from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import RunDir, open_run
from r1hpc.config import freeze, load
from r1hpc.config.schema import RunConfig
from r1hpc.data.preview import preview_vocab_size
from r1hpc.plan.run import RunPlan
from r1hpc.plan.weights import check_weights
from r1hpc.slurm import decide, fields, flags, script
from r1hpc.slurm.probe import ClusterFacts
from r1hpc.submission.order import DEFAULT_JOB, Order, Purpose
from r1hpc.submission.run_estimate import estimate_for

ASSUMED_GPUS_PER_NODE = 8
"""Where nothing says how many a node has, and no cluster is asked."""
_MAY_CHANGE_SECTIONS = ("resources.", "cluster.", "limits.", "monitor.", "checkpoint.")
_MAY_CHANGE_KEYS = (
    *("train.num_steps", "train.print_every", "train.hang_timeout_s", "deepspeed.zero_stage"),
    *("rollout.max_prompt_length", "rollout.prompts_per_batch"),
)


@dataclass(frozen=True)
class PlannedRun:
    """All that is decided before the first file is written."""

    run: RunDir
    executor: str
    """slurm or local."""
    config: RunConfig
    """Nothing in it is left open."""
    plan: RunPlan
    script: script.Script
    notes: tuple[str, ...]
    """Sentences for the person: what was assumed, the warning before a kill, what could not be learnt."""
    is_new: bool = True
    """The run folder is still to be made."""
    estimate: dict[str, Any] | None = None
    """What it will cost, as estimate.json holds it; None: not known."""
    needs: tuple[str, ...] | None = None
    """The stages of a chain that must be finished before this one begins."""


def plan_new_run(order: Order) -> PlannedRun:
    """A run that does not exist yet.

    Raises:
        UsageError: it does.
    """
    config = load.load(order.job or DEFAULT_JOB, order.overrides, order.cluster)
    run = order.new_run()
    if os.path.lexists(run.path):
        raise UsageError(
            f"there is a run called {run.run_id} in {run.path.parent}: go on with it by --resume, "
            "or choose another --run-name"
        )
    return plan_run(run, config, order)


def plan_resumed_run(order: Order) -> PlannedRun:
    """A run that exists: its frozen code and configuration, with other resources or more steps.

    Raises:
        UsageError: it is at work, or finished, or the overrides would make another run of it.
    """
    run = open_run(order.resumed_run().path)
    now = look(run)
    if now.state.is_at_work:
        job = now.job.job_id if now.job else "?"
        raise UsageError(f"{run.run_id} is {now.state} as job {job}: cancel it first, or touch {run.stop}")
    config = reconfigured(run, order)
    frozen = load.read(run.config)
    if run.finished.exists() and config.train.num_steps <= frozen.train.num_steps:
        raise UsageError(
            f"{run.run_id} is finished; to train on, give train.num_steps={frozen.train.num_steps * 2}"
        )
    return plan_run(run, config, order, is_new=False)


def plan_run(
    run: RunDir,
    config: RunConfig,
    order: Order,
    *,
    facts: ClusterFacts | None = None,
    expected_model: Mapping[str, Any] | None = None,
    is_new: bool = True,
) -> PlannedRun:
    """Check the configuration, ask the cluster, plan, write the script's text, and estimate.

    Args:
        facts: of the cluster, where they are known already.
        expected_model: the config.json that an earlier stage will leave in model.path.
    """
    fields.check_cluster(config.cluster)
    fields.check_resources(config.resources)
    config = freeze.with_absolute_paths(config)
    freeze.refuse_secrets(config, order.overrides)
    if is_new:  # a run of before goes on as it was begun, from its checkpoints
        _check_weights(config, expected_model)
    _check_questions(config, expected_model, is_new=is_new)
    vocabulary = vocab_size(config)
    executor, notes = decide.choose_executor(order.executor, will_submit=order.purpose is Purpose.start)
    decision = decide.decide(
        config,
        executor,
        vocab_size=vocabulary,
        assumed_gpus_per_node=ASSUMED_GPUS_PER_NODE if order.is_dry_run else None,
        facts=facts,
        expected_model=expected_model,
    )
    text = script.make_script(
        run, decision.config, gpus_per_node=decision.gpus_per_node, signal_lead_s=decision.signal_lead_s
    )
    estimate, no_estimate = estimate_for(order.run_root, decision.config, decision.plan)
    ignored = ", ".join(flags.ignored_variables(os.environ))
    notes += [f"not used from the environment: {ignored}"] if ignored else []
    notes = [*notes, *decision.notes, *no_estimate]
    return PlannedRun(run, executor, decision.config, decision.plan, text, tuple(notes), is_new, estimate)


def _check_weights(config: RunConfig, expected_model: Mapping[str, Any] | None) -> None:
    """Refuse a model.path without weights, but for one that an earlier stage has yet to write."""
    model = config.model
    is_to_come = expected_model is not None and not Path(model.path or "", "config.json").is_file()
    if config.stage != "traces" and not is_to_come:  # demonstrations are computed: no model is loaded
        check_weights(model)


def _check_questions(
    config: RunConfig, expected_model: Mapping[str, Any] | None = None, *, is_new: bool = True
) -> None:
    """Task, rewards and tokenizer of a stage that asks questions: what it would only meet on the nodes.

    Args:
        expected_model: as in `plan_run`; the tokenizer is then the earlier stage's to leave.
        is_new: False for a run of before, which goes on as it was begun.

    Raises:
        UsageError: an unknown task, option or reward term, a file or package that is missing, more held-out
            questions than there are, or a prompt that the tokenizer cannot read or that is too long.
    """
    if config.stage not in ("traces", "rl", "generate", "evaluate"):
        return
    from r1hpc.tasks import registry, terms, tokenizer  # the tokenizers library, for these runs only
    from r1hpc.tasks.task import check_num_held_out

    task = registry.make_task(config.task)
    if is_new and config.stage in ("rl", "evaluate"):
        check_num_held_out(task, config.evaluate.num_items)
    item = task.item(config.generate.first_item if config.stage == "generate" else 0)
    if config.stage == "traces":
        return
    for name in config.reward.terms:
        terms.term_named(name)
    if expected_model is None or config.model.tokenizer is not None:
        num = len(tokenizer.encode(tokenizer.load_tokenizer(config.model), item.prompt))
        if num > config.rollout.max_prompt_length:
            raise UsageError(
                f"the first prompt has {num} tokens: raise rollout.max_prompt_length, now "
                f"{config.rollout.max_prompt_length}"
            )


def vocab_size(config: RunConfig) -> int | None:
    """The vocabulary a run's model must have at least; None where nobody knows it before the run begins."""
    if config.stage == "pretrain":
        return preview_vocab_size(config.data.path, config.data.recipe)
    if config.model.tokenizer != "characters":
        return None
    from r1hpc.tasks.tokenizer import character_tokenizer  # the tokenizers library, for these runs only

    size: int = character_tokenizer().get_vocab_size()
    return size


def reconfigured(run: RunDir, order: Order) -> RunConfig:
    """The frozen configuration of a run with the overrides of this order.

    Raises:
        UsageError: that would be another run.
    """
    # The warning is chosen anew for the time limit and the cluster of this submission.
    overrides = ["resources.signal_lead_s=null", *order.overrides]
    config = load.load(run.config, overrides, order.cluster)
    wrong = forbidden_changes(load.read(run.config), config)
    if wrong:
        raise UsageError(
            f"--resume cannot change {', '.join(wrong)}: that would be another run. It may change resources, "
            "limits, checkpoint.*, monitor.* and train.num_steps; for the rest take a new --run-name"
        )
    return config


def forbidden_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """The keys in which they differ and may not: a resumed run must see the same data in the same batches."""
    a, b = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    changed = (key for key in sorted({*a, *b}) if a.get(key) != b.get(key))
    return [
        key for key in changed if not key.startswith(_MAY_CHANGE_SECTIONS) and key not in _MAY_CHANGE_KEYS
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
