"""Submit one run: decide everything, freeze it into the run folder, start it. Also a stage of a chain.

    prepared = fresh(run, config, order)        # or resumed(run, order); nothing is written yet
    job_id = submit(prepared, order)

Each step may be cut off by a kill: a folder without config.yaml was never whole and is made again; a job that
sbatch took and nobody wrote down is found by its folder (slurm.queue).
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from r1hpc.attempt.needs import write_needs
from r1hpc.attempt.state import State, look
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import write_atomic, write_json
from r1hpc.base.names import check_name
from r1hpc.base.rundir import RunDir, default_run_root, open_run
from r1hpc.config import freeze, load
from r1hpc.config.redact import redact
from r1hpc.config.schema import RunConfig
from r1hpc.data.preview import preview_vocab_size
from r1hpc.plan.hardware import UnknownGpuError
from r1hpc.plan.weights import check_weights
from r1hpc.slurm import decide, fields, flags, script
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.environment import without_foreign_ranks
from r1hpc.slurm.probe import ClusterFacts
from r1hpc.submission import cost
from r1hpc.submission.text import Prepared
from r1hpc.telemetry.attempts import record

_ASSUMED_GPUS_PER_NODE = 8
_MAY_CHANGE_ON_RESUME = ("resources.", "cluster.", "limits.", "monitor.", "checkpoint.")
_MAY_CHANGE_TOO = (
    *("train.num_steps", "train.print_every", "train.hang_timeout_s", "deepspeed.zero_stage"),
    *("rollout.max_prompt_length", "rollout.prompts_per_batch"),
)


AT_WORK = (State.queued, State.running, State.requeued)


class Purpose(StrEnum):
    """What a submission is for."""

    start = "start"
    dry_run = "dry run"
    """Nothing is written, and what only a cluster knows is assumed."""
    inside_job = "inside job"
    """sbatch/train.sh: the job is there, and asks for its folder."""


@dataclass(frozen=True)
class Order:
    """What a submission was told besides the configuration itself."""

    purpose: Purpose = Purpose.start
    executor: str = "auto"
    argv: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    """In order: SBATCH_* variables, KEY=VALUE, flags."""
    cluster: str | None = None
    """Name of a profile."""
    run_root: Path = field(default_factory=default_run_root)
    """Where finished runs tell what estimates are worth, and the budget may lie."""
    over_budget: str | None = None
    """Why the budget may be exceeded, on record."""


def place(run_root: str | None, name: str) -> RunDir:
    """The folder of a run or of a chain under the run root.

    Raises:
        UsageError: a name or a path that cannot stand in a job script.
    """
    root = Path(run_root) if run_root else default_run_root()
    fields.check_path(root.absolute(), "--run-root")
    return RunDir(root / check_name(name, "--run-name"))


def fresh(run: RunDir, config: RunConfig, order: Order) -> Prepared:
    """A run that does not exist yet.

    Raises:
        UsageError: it does.
    """
    if os.path.lexists(run.path):
        raise UsageError(
            f"there is a run called {run.run_id} in {run.path.parent}: go on with it by --resume, "
            "or choose another --run-name"
        )
    return prepare(run, config, order)


def resumed(run: RunDir, order: Order) -> Prepared:
    """A run that exists: its frozen code and configuration, with other resources or more steps.

    Raises:
        UsageError: it is at work, or finished, or the overrides would make another run of it.
    """
    run = open_run(run.path)
    now = look(run)
    if now.state in AT_WORK:
        job = now.job.job_id if now.job else "?"
        raise UsageError(f"{run.run_id} is {now.state} as job {job}: cancel it first, or touch {run.stop}")
    config = reconfigured(run, order)
    frozen = load.read(run.config)
    if run.finished.exists() and config.train.num_steps <= frozen.train.num_steps:
        raise UsageError(
            f"{run.run_id} is finished; to train on, give train.num_steps={frozen.train.num_steps * 2}"
        )
    return prepare(run, config, order, is_new=False)


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
    return [
        key
        for key in changes(before, after)
        if not key.startswith(_MAY_CHANGE_ON_RESUME) and key not in _MAY_CHANGE_TOO
    ]


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """The dotted keys in which two configurations differ."""
    a, b = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def prepare(
    run: RunDir,
    config: RunConfig,
    order: Order,
    *,
    facts: ClusterFacts | None = None,
    expected_model: Mapping[str, Any] | None = None,
    is_new: bool = True,
) -> Prepared:
    """Choose the executor, ask the cluster, plan, and check every field; write nothing.

    Args:
        facts: of the cluster, where they are known already.
        expected_model: the config.json that an earlier stage will leave in model.path.
    """
    fields.check_resources(config.resources)
    fields.check_cluster(config.cluster)
    freeze.refuse_secrets(config, order.overrides)
    executor, notes = decide.choose_executor(order.executor, will_submit=order.purpose is Purpose.start)
    config = freeze.with_absolute_paths(config)
    if is_new:  # a run of before goes on as it was begun, from its checkpoints
        _check_weights(config, expected_model)
    check_questions(config, expected_model, is_new=is_new)
    decision = decide.decide(
        config,
        executor,
        vocab_size=vocab_size(config),
        assumed_gpus_per_node=_ASSUMED_GPUS_PER_NODE if order.purpose is Purpose.dry_run else None,
        facts=facts,
        expected_model=expected_model,
    )
    text = script.make_script(
        run, decision.config, gpus_per_node=decision.gpus_per_node, signal_lead_s=decision.signal_lead_s
    )
    ignored = ", ".join(flags.ignored_variables(os.environ))
    notes += [f"not used from the environment: {ignored}"] if ignored else []
    estimate, no_estimate = _estimate(decision, order)
    return Prepared(run, executor, decision, text, (*notes, *decision.notes, *no_estimate), is_new, estimate)


def _check_weights(config: RunConfig, expected_model: Mapping[str, Any] | None) -> None:
    """Refuse a model.path without weights, but for one that an earlier stage has yet to write."""
    model = config.model
    is_to_come = expected_model is not None and not Path(model.path or "", "config.json").is_file()
    if config.stage != "traces" and not is_to_come:  # demonstrations are computed: no model is loaded
        check_weights(model)


def check_questions(
    config: RunConfig, expected_model: Mapping[str, Any] | None = None, *, is_new: bool = True
) -> None:
    """Task, rewards and tokenizer of a stage that asks questions: what it would only meet on the nodes.

    Args:
        expected_model: as in `prepare`; the tokenizer is then the earlier stage's to leave.
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


def _estimate(decision: decide.Decision, order: Order) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        return cost.estimate_for(order.run_root, decision.config, decision.plan), []
    except UnknownGpuError as error:
        return None, [f"no estimate: {error}"]


def vocab_size(config: RunConfig) -> int | None:
    """The vocabulary a run's model must have at least; None where nobody knows it before the run begins."""
    if config.stage != "pretrain":
        if config.model.tokenizer != "characters":
            return None
        from r1hpc.tasks.tokenizer import character_tokenizer  # the tokenizers library, for these runs only

        size: int = character_tokenizer().get_vocab_size()
        return size
    return preview_vocab_size(config.data.path, config.data.recipe)


def submit(prepared: Prepared, order: Order) -> str:
    """Write the run folder and start the run; its job id. A new folder does not survive a refusal.

    Raises:
        R1hpcError: the folder cannot be made, or Slurm refuses.
    """
    run = prepared.run
    if prepared.is_new:
        create(run)
    try:
        write(prepared, order)
        failpoint("submit.written")
        asked_at = time.time()
        job_id = _start(prepared)
    except (R1hpcError, OSError) as error:
        # An sbatch that did not answer may have submitted all the same: then the job needs its folder.
        if isinstance(error, SlurmError) and error.timed_out:
            raise R1hpcError(
                f"{error}\n{run.path} is kept: look with squeue whether the job is there"
            ) from None
        if prepared.is_new:
            shutil.rmtree(run.path)
        raise
    failpoint("submit.asked")
    record_submission(prepared, order, job_id, asked_at)
    return job_id


def create(run: RunDir) -> None:
    """Make the run's folders.

    Raises:
        UsageError: they exist.
        R1hpcError: the run root cannot be written, or anybody could put another folder in their place.
    """
    create_parent(run)
    try:
        run.create()
    except FileExistsError:
        raise UsageError(f"another submission has just taken the name {run.run_id}: choose another") from None
    except OSError as error:
        raise _no_folder(run.path, error) from None


def create_parent(run: RunDir) -> None:
    """Make the run root.

    Raises:
        R1hpcError: it cannot be made, or anybody could put another folder in its place.
    """
    try:
        run.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(run.path.parent, error) from None
    fields.check_parents(run.path)


def write(prepared: Prepared, order: Order) -> None:
    """Everything the job will read. Of a resumed run the code stays; configuration and plan are renewed."""
    run, decision = prepared.run, prepared.decision
    if prepared.is_new:
        freeze.freeze(run, decision.config, order.argv, order.overrides)
    else:
        load.save(decision.config, run.config)
    if prepared.needs is not None:
        write_needs(run, prepared.needs)
    write_json(run.plan, decision.plan.to_json())
    if prepared.estimate is not None:
        write_json(run.path / "estimate.json", prepared.estimate)
    write_atomic(run.script, script.render(prepared.script))


def _start(prepared: Prepared) -> str:
    """Hand the written run to Slurm or to a supervisor here; its job id."""
    remove_switches(prepared.run)
    return _start_here(prepared.run) if prepared.executor == "local" else _start_on_slurm(prepared)


def record_submission(prepared: Prepared, order: Order, job_id: str, asked_at: float) -> None:
    """Put the submission on record, dated before the start: the attempt that follows belongs to it."""
    record(
        prepared.run,
        "submitted",
        time=asked_at,
        executor=prepared.executor,
        job_id=job_id,
        script=str(prepared.run.script),
        time_limit_s=prepared.decision.plan.time_limit_s,
        overrides=[redact(item) for item in order.overrides],
        **({"over_budget": redact(order.over_budget)} if order.over_budget is not None else {}),
    )


def remove_switches(run: RunDir) -> None:
    """Those of an earlier submission: asking for the run again takes them back."""
    for switch in (run.stop, run.save, run.finished):
        switch.unlink(missing_ok=True)


def is_half_made(run: RunDir) -> bool:
    """Whether the folder is one of ours that was never submitted: no event, no checkpoint."""
    ours = run.logs.is_dir() and run.checkpoints.is_dir() and run.ledger.is_dir()
    return ours and not run.attempts.exists() and not any(run.checkpoints.iterdir())


def start_detached(words: list[str], run: RunDir, log: Path, keep: tuple[int, ...] = ()) -> int:
    """Start `python -m r1hpc.launch WORDS` with the frozen code of a run so that it outlives this terminal.

    Args:
        log: what it prints is appended there.
        keep: descriptors it inherits.
    """
    environment = {
        **without_foreign_ranks(os.environ),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(run.code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "r1hpc.launch", *words],
            cwd=run.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep,
        )
    return process.pid


def _start_here(run: RunDir) -> str:
    return f"local-{start_detached(['local', str(run.path)], run, run.logs / 'local.out')}"


def _start_on_slurm(prepared: Prepared) -> str:
    from r1hpc.slurm.submission import submit  # submitit, which --help need not wait for

    return submit(prepared.run, prepared.decision.plan.topology.world_size)


def _no_folder(path: Path, error: OSError) -> R1hpcError:
    return R1hpcError(f"cannot make the folder {path} ({error.strerror}): choose another --run-root")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
