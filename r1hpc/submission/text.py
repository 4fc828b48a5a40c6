"""What a submission is, once everything is decided, and what it prints.

announce(prepared, job_id, as_json=False)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.cli import print_json
from r1hpc.base.rundir import RunDir
from r1hpc.base.units import format_duration
from r1hpc.estimator.estimate_text import amount
from r1hpc.slurm.decide import Decision
from r1hpc.slurm.script import Script, render


@dataclass(frozen=True)
class Prepared:
    """All that is decided before the first file is written."""

    run: RunDir
    executor: str
    decision: Decision
    script: Script
    notes: tuple[str, ...]
    """Sentences for the person: what was assumed, the warning window, what could not be learnt."""
    is_new: bool = True
    """The run folder is still to be made."""
    estimate: dict[str, Any] | None = None
    """What it will cost, as estimate.json holds it; None: nobody can tell."""
    needs: tuple[str, ...] | None = None
    """Of a stage of a chain: the stages that must be finished before it begins."""


def announce(prepared: Prepared, job_id: str | None, as_json: bool, dry_run: bool = False) -> None:
    """Print it for a person, or as the one JSON object of --json. `job_id` None: nothing was submitted."""
    run, executor = prepared.run, prepared.executor
    on_slurm = executor == "slurm"
    if as_json:
        result = {
            "run_id": run.run_id,
            "run_dir": str(run.path),
            "executor": executor,
            "job_id": job_id,
            "script": str(run.script) if on_slurm else None,
            "plan": prepared.decision.plan.to_json(),
            "estimate": prepared.estimate,
            "log": str(log_path(run, executor, job_id)),
            "notes": list(prepared.notes),
            "dry_run": dry_run,
        }
        print_json({**result, "script_text": render(prepared.script)} if dry_run and on_slurm else result)
        return
    if dry_run and on_slurm:
        print(render(prepared.script))
    lines = [
        ("run", str(run.path) + (" (not written: a dry run)" if dry_run else "")),
        *plan_lines(prepared),
    ]
    lines += [("note", note) for note in prepared.notes]
    if job_id is not None:
        lines += _handles(run, executor, job_id)
    print("\n".join(f"{name:8} {words}" for name, words in lines))


def plan_lines(prepared: Prepared) -> list[tuple[str, str]]:
    """Nodes, batch and ceiling of a run, as (name, words)."""
    plan = prepared.decision.plan
    where, batch = plan.topology, plan.batch
    ranks = "GPUs" if where.num_gpus else "CPU ranks"
    per_node = where.world_size // where.num_nodes
    lines = [
        ("nodes", f"{where.num_nodes} x {per_node} {ranks}"),
        (
            "batch",
            f"{batch.global_batch_size} sequences of {plan.seq_len} tokens = {batch.micro_batch_size} per "
            f"rank x {batch.gradient_accumulation_steps} accumulated x {where.world_size} ranks; "
            f"{plan.num_steps} steps",
        ),
    ]
    # What a CPU run costs is its nodes.
    what, count = ("GPU", where.num_gpus) if where.num_gpus else ("node", where.num_nodes)
    told = (prepared.estimate or {}).get(f"{what.lower()}_hours")
    if told is not None:
        p10, p50, p90 = (amount(told[name]) for name in ("p10", "p50", "p90"))
        lines.append(("estimate", f"{p50} {what}-hours (P10 {p10}, P90 {p90})"))
    hours = plan.gpu_hours_ceiling if where.num_gpus else plan.node_hours_ceiling
    if hours is not None and plan.time_limit_s is not None:
        limit = f"{count} {what}{'s' if count > 1 else ''} x {format_duration(plan.time_limit_s)}"
        lines.append(("ceiling", f"{hours:,.1f} {what}-hours per attempt ({limit})"))
    return lines


def _handles(run: RunDir, executor: str, job_id: str) -> list[tuple[str, str]]:
    cancel = f"python -m r1hpc.cancel {run.path}" if executor == "local" else f"scancel {job_id}"
    script = [("script", str(run.script))] if executor == "slurm" else []
    return [
        ("job", f"{job_id} ({executor})"),
        *script,
        ("log", f"{log_path(run, executor, job_id)}"),
        ("ranks", f"{run.logs}/latest/"),
        ("follow", f"python -m r1hpc.logs {run.path} -f"),
        ("status", f"python -m r1hpc.status {run.path}"),
        ("stop", f"touch {run.stop} (saves first)"),
        ("cancel", cancel),
    ]


def log_path(run: RunDir, executor: str, job_id: str | None) -> Path:
    """What the batch script, or the local supervisor, prints."""
    return run.logs / ("local.out" if executor == "local" else f"slurm-{job_id or '%j'}.out")
