"""What a submission of a chain prints: for a person, or as the one JSON object of --json."""

from pathlib import Path
from typing import Any

from r1hpc.base.cli import print_json
from r1hpc.base.files import read_json
from r1hpc.base.tables import format_table
from r1hpc.submission.chain_steps import Action, StageStep
from r1hpc.submission.run_text import log_path, plan_lines, script_keys, wrapped_lines
from r1hpc.submission.submit_chain import SubmittedChain


def print_chain(done: SubmittedChain, as_json: bool) -> None:
    """Print it. A dry run has no jobs."""
    if as_json:
        print_json(as_object(done))
    else:
        print(as_text(done))


def as_object(done: SubmittedChain) -> dict[str, Any]:
    """{"chain", "chain_dir", "executor", "stages": [{"stage", "run_id", "run_dir", "job_id", …}]}."""
    return {
        "chain": done.chain.name,
        "chain_dir": str(done.chain.path),
        "executor": done.executor,
        "dry_run": done.is_dry_run,
        "notes": list(done.notes),
        "stages": [_stage_object(step, done) for step in done.steps],
    }


def as_text(done: SubmittedChain) -> str:
    """The chain, a line per stage, in a dry run each stage's plan, and how to come back."""
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


def _ends(prompt: str) -> tuple[str, str]:
    """Where its form is to be seen: the question stands between."""
    return prompt[:40], prompt[-30:]


def _plan_text(step: StageStep, forms: set[tuple[str, str]]) -> str:
    """With a prompt where it is put in another form than those in `forms`, to which it is added."""
    needs = f"after {', '.join(step.stage.needs)}" if step.stage.needs else "at once"
    already = "" if step.action is Action.submit else f" ({step.action})"
    lines = [f"{step.stage.name}: {step.stage.config.stage}, {needs}{already}"]
    if step.planned is not None:
        form = _ends(step.planned.prompt or "")
        shown = [
            (name, text) for name, text in plan_lines(step.planned) if name != "asks" or form not in forms
        ]
        forms.add(form)
        lines.append(wrapped_lines(shown, indent="  "))
    return "\n".join(lines)
