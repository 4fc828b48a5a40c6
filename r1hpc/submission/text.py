"""Describe a submission of a run or a chain: as text for a person, and as the one JSON object of --json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1hpc.base.files import read_json
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import format_table, wrap
from r1hpc.base.units import format_duration, format_parameters
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import in_parts, is_rl, is_server, loads_model, trains
from r1hpc.plan.memory.run import held
from r1hpc.slurm.script import render
from r1hpc.submission.chain_steps import Action, StageStep
from r1hpc.submission.plan_run import PlannedRun
from r1hpc.submission.submit_chain import SubmittedChain


def run_as_object(planned: PlannedRun, job_id: str | None) -> dict[str, Any]:
    """Return the object of --json. `script` is the file that runs; in a dry run, `job_id` None, its text."""
    run = planned.run
    return {
        "run_id": run.run_id,
        "run_dir": str(run.path),
        "executor": planned.executor,
        "job_id": job_id,
        **script_keys(planned, dry_run=job_id is None),
        "plan": planned.plan.to_json(),
        "estimate": planned.estimate,
        "log": str(log_path(run, planned.executor, job_id)),
        "prompt": planned.prompt,
        "notes": list(planned.notes),
        "dry_run": job_id is None,
    }


def script_keys(planned: PlannedRun, dry_run: bool) -> dict[str, str]:
    """Return `script`: the file of a submission, or the text of a dry run, which adds `script_text`.

    The folder of a local run holds the same script, so that it can continue in Slurm.
    """
    if not dry_run:
        return {"script": str(planned.run.script)}
    text = render(planned.script)
    return {"script": text, "script_text": text}


def run_as_text(planned: PlannedRun, job_id: str | None) -> str:
    """Return plan and notes; then the commands for the run. In a dry run the script comes first."""
    run, is_dry_run = planned.run, job_id is None
    # A terminal shows the last lines: those of the plan.
    script = [render(planned.script)] if is_dry_run and planned.executor == "slurm" else []
    place = f"run      {run.path}" + (" (not written: a dry run)" if is_dry_run else "")
    texts = [place, wrapped_lines([*plan_lines(planned), *(("note", note) for note in planned.notes)])]
    if job_id is not None:
        # Not wrapped, so that they can be copied.
        texts += [f"{name:8} {text}" for name, text in _handles(planned, job_id)]
    return "\n".join([*script, *texts])


def wrapped_lines(lines: Iterable[tuple[str, str]], indent: str = "") -> str:
    """Return (name, text) pairs in two columns, no wider than the terminal."""
    return "\n".join(wrap(f"{name:8} {text}", indent, f"{indent}{'':9}") for name, text in lines)


def plan_lines(planned: PlannedRun) -> list[tuple[str, str]]:
    """Return nodes, batch, estimate and ceiling of a run, as (name, text)."""
    plan = planned.plan
    where = plan.topology
    ranks = "GPUs" if where.num_gpus else "CPU ranks"
    per_node = where.gpus_per_node or where.ranks_per_node
    lines = [*_model_line(planned), ("nodes", f"{where.num_nodes} x {per_node} {ranks}")]
    if is_server(planned.config.stage):
        idle = planned.config.serve.idle_minutes
        when = f"without a request for {format_duration(60 * idle)}, or " if idle else ""
        lines.append(("ends", f"{when}at its time limit"))
    elif trains(planned.config.stage) or in_parts(planned.config.stage):
        lines.append(_batch_line(planned))
    if planned.prompt is not None:
        shown = repr(planned.prompt)  # cut in the middle, the question; its form is at both ends
        lines.append(("asks", shown if len(shown) <= 400 else f"{shown[:250]} ... {shown[-145:]}"))
    if planned.config.stage in ("rl", "evaluate"):
        lines += _learning_lines(planned.config)
    if plan.memory is not None and where.num_gpus:
        lines.append(
            ("memory", f"on each GPU {held(plan.memory)}; {plan.memory.host_gib:.0f} GiB of a node's own")
        )
    # A CPU run is charged by its nodes.
    what, count = ("GPU", where.num_gpus) if where.num_gpus else ("node", where.num_nodes)
    if planned.hours is not None:
        lines.append(("estimate", planned.hours.text(f"{what}-hours")))
    elif planned.config.stage == "script":
        lines.append(("estimate", "not known before a first run of this script has finished on such nodes"))
    hours = plan.gpu_hours_ceiling if where.num_gpus else plan.node_hours_ceiling
    if hours is not None and plan.time_limit_s is not None:
        limit = f"{count} {what}{'s' if count > 1 else ''} x {format_duration(plan.time_limit_s)}"
        lines.append(("ceiling", f"{hours:,.1f} {what}-hours per attempt ({limit})"))
    return lines


def _learning_lines(config: RunConfig) -> list[tuple[str, str]]:
    asked = config.evaluate
    terms = " + ".join(f"{weight:g} {name}" for name, weight in config.reward.terms.items())
    source = ", ".join(asked.sets) or asked.path or f"task {config.task.name}, held out"
    num = asked.num_items or ("all" if asked.sets or asked.path else 256)
    every = f", every {asked.every} steps" if asked.every else ""
    when = f"; before the first step{every} and at the end" if is_rl(config.stage) else ""
    reward = [("reward", terms)] if is_rl(config.stage) else []
    return [*reward, ("tests", f"{num} questions x {asked.num_samples} samples of {source}{when}")]


def _batch_line(planned: PlannedRun) -> tuple[str, str]:
    plan, shared = planned.plan, planned.config.train.sequence_parallel
    batch, world = plan.batch, plan.topology.world_size
    reader, readers = "rank", f"{world} ranks"
    if shared > 1:
        reader, readers = "group", f"{world // shared} groups of {shared} ranks that share sequences"
    return (
        "batch",
        f"{batch.global_batch_size} sequences of {plan.seq_len} tokens = {batch.micro_batch_size} per "
        f"{reader} x {batch.gradient_accumulation_steps} accumulated x {readers}; "
        f"{plan.num_steps} steps",
    )


def _model_line(planned: PlannedRun) -> list[tuple[str, str]]:
    """Return where the weights come from; random ones are announced."""
    model, count = planned.config.model, planned.plan.num_parameters
    if not loads_model(planned.config.stage):
        return []
    origin = "from scratch" if model.path is None or model.from_scratch else model.path
    lines = [("model", origin, count)]
    if is_rl(planned.config.stage) and planned.config.rl.teacher is not None:
        lines.append(("teacher", planned.config.rl.teacher, planned.plan.teacher_parameters))
    return [
        (name, whence if size is None else f"{whence}: {format_parameters(size)}")
        for name, whence, size in lines
    ]


def _handles(planned: PlannedRun, job_id: str) -> list[tuple[str, str]]:
    run, executor = planned.run, planned.executor
    cancel = f"python -m r1hpc.cancel {run.path}" if executor == "local" else f"scancel {job_id}"
    script = [("script", str(run.script))] if executor == "slurm" else []
    return [
        ("job", f"{job_id} ({executor})"),
        *script,
        ("log", f"{log_path(run, executor, job_id)}"),
        ("ranks", f"{run.logs}/latest/"),
        ("follow", f"python -m r1hpc.logs {run.path} -f"),
        ("status", f"python -m r1hpc.status {run.path}"),
        ("stop", f"touch {run.stop}" + (" (saves first)" if not is_server(planned.config.stage) else "")),
        ("cancel", cancel),
    ]


def log_path(run: RunDir, executor: str, job_id: str | None) -> Path:
    """Return the output file of the batch script or the local supervisor."""
    return run.logs / ("local.out" if executor == "local" else f"slurm-{job_id or '%j'}.out")


def chain_as_object(done: SubmittedChain) -> dict[str, Any]:
    """Return {"chain", "chain_dir", "executor", "stages": [{"stage", "run_id", "run_dir", "job_id", …}]}."""
    return {
        "chain": done.chain.name,
        "chain_dir": str(done.chain.path),
        "executor": done.executor,
        "dry_run": done.is_dry_run,
        "notes": list(done.notes),
        "stages": [_stage_object(step, done) for step in done.steps],
    }


def chain_as_text(done: SubmittedChain) -> str:
    """Return the chain, a line per stage, in a dry run each stage's plan, and the commands for it."""
    chain = done.chain
    place = f"chain    {chain.path}" + (" (not written: a dry run)" if done.is_dry_run else "")
    lines = [("note", note) for note in done.notes]
    if all(step.action is Action.skip for step in done.steps):
        lines.append(("note", "every stage is finished; to begin anew, take another --run-name"))
    texts = ["\n".join([place, wrapped_lines(lines)]) if lines else place]
    if done.is_dry_run:
        forms: set[tuple[str, str]] = set()
        texts += [_plan_text(step, forms) for step in done.steps]
    else:
        rows = [
            (s.stage.name, str(s.action), done.jobs.get(s.stage.name, "-"), ", ".join(s.stage.needs) or "-")
            for s in done.steps
        ]
        texts.append(format_table(("stage", "is", "job", "after"), rows, indent="  "))
        handles = [
            ("status", f"python -m r1hpc.status {chain.path}"),
            ("logs", f"python -m r1hpc.logs {chain.path} -f"),
            ("cancel", f"python -m r1hpc.cancel {chain.path}"),
            ("go on", f"python -m r1hpc.submit --run-root {chain.path.parent} --run-name {chain.name}"),
        ]
        texts.append("\n".join(f"{name:8} {text}" for name, text in handles))
    return "\n\n".join(texts)


def _stage_object(step: StageStep, done: SubmittedChain) -> dict[str, Any]:
    planned, run = step.planned, step.run
    job_id = done.jobs.get(step.stage.name)
    return {
        "stage": step.stage.name,
        "run_id": run.run_id,
        "run_dir": str(run.path),
        "needs": list(step.stage.needs),
        "action": step.action.value,
        "job_id": job_id,
        "executor": done.executor,
        **(script_keys(planned, done.is_dry_run) if planned is not None else {"script": str(run.script)}),
        "plan": planned.plan.to_json() if planned is not None else _stored(run.plan),
        "estimate": planned.estimate if planned is not None else _stored(run.estimate),
        "prompt": planned.prompt if planned is not None else None,
        "log": str(log_path(run, done.executor, job_id)),
    }


def _stored(path: Path) -> Any:
    return read_json(path, dict[str, Any]) if path.is_file() else None


def _plan_text(step: StageStep, forms: set[tuple[str, str]]) -> str:
    """Return the plan, with a prompt if its form is not in `forms`, to which it is added."""
    needs = f"after {', '.join(step.stage.needs)}" if step.stage.needs else "at once"
    already = "" if step.action is Action.submit else f" ({step.action})"
    lines = [f"{step.stage.name}: {step.stage.config.stage}, {needs}{already}"]
    if step.planned is not None:
        prompt = step.planned.prompt or ""
        form = prompt[:40], prompt[-30:]  # the question is between
        shown = [
            (name, text) for name, text in plan_lines(step.planned) if name != "asks" or form not in forms
        ]
        forms.add(form)
        lines.append(wrapped_lines(shown, indent="  "))
    return "\n".join(lines)
