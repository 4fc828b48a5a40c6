"""Show the state of a run and of its attempts.

    python -m r1hpc.status                     # the newest run under the run root
    python -m r1hpc.status --all               # every run under the run root, one line each
    python -m r1hpc.status --all 'grpo-*' --state running --stage rl   # only these
    python -m r1hpc.status RUN_DIR --json      # state, attempt, global_step, ..., attempts: [...]
    python -m r1hpc.status CHAIN               # each stage of a chain; CHAIN/STAGE is a run

States: queued, running, requeued (between two attempts), finished, stopped, cancelled, failed, unknown. It
waits for Slurm, if there is one, at most 5 seconds; otherwise the answer is "as of the run folder".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from r1hpc.base.choose_run import (
    add_run,
    all_runs,
    choose_run,
    folders_with,
    full_name,
    list_runs,
    unreadable,
)
from r1hpc.base.cli import ArgumentParser, add_json, print_json, print_result, run_command
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import SWEEP, RunDir, run_root_of
from r1hpc.base.tables import cell, coloured, format_table, wrap
from r1hpc.base.units import format_duration

if TYPE_CHECKING:  # only for types: --help must be quick
    from r1hpc.accounting.ledger import RunLedger
    from r1hpc.attempt.state.state import Situation, State
    from r1hpc.submission.chain.folder import ChainDir
    from r1hpc.sweeps.definition import SweepDir
    from r1hpc.telemetry.records.attempts import Attempt

_Folder = TypeVar("_Folder", bound="ChainDir")
DAMAGED = "damaged"
_MOST_RUNS = 50
"""--all shows the newest runs; each open one may need a query to Slurm."""
_MOST_OF_A_LINE = 300
_HEADINGS = ("#", "cause", "start", "duration", "nodes", "GPUs", "steps", "committed")


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.status", description=__doc__)
    add_run(parser, "a run or a chain: its folder or its name")
    parser.add_argument("--verify", action="store_true", help="hash the results and compare with FINISHED")
    parser.add_argument("--all", action="store_true", help="all runs under the run root, or those like RUN")
    parser.add_argument("--state", metavar="STATE", help="with --all: only runs in this state")
    parser.add_argument("--stage", metavar="STAGE", help="with --all: only runs of this stage")
    add_json(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.accounting.open_ledger import settled_ledger
    from r1hpc.submission.chain.folder import choose_chain

    if arguments.all:
        return _show_all(arguments)
    if arguments.state or arguments.stage:
        raise UsageError("--state and --stage choose among all runs: add --all")
    chain = choose_chain(arguments.run_dir, arguments.run_root)
    if chain is None:
        run, now = choose_run(arguments.run_dir, arguments.run_root), time.time()
        ledger = settled_ledger(run, now)
        shown = as_json(ledger, verify=arguments.verify)
        text = as_text(ledger, shown, now)
    else:
        shown, ledgers = _chain_now(chain, arguments.verify)
        text = chain_as_text(shown, ledgers)
    print_result(shown, coloured(text), arguments.json)
    states = [each.get("results") or "" for each in shown.get("stages", [shown])]
    return 1 if arguments.verify and any(each.startswith(DAMAGED) for each in states) else 0


def _chain_now(chain: ChainDir, verify: bool = False) -> tuple[dict[str, Any], dict[str, RunLedger]]:
    """Return {"chain", "state", …, "stages": [each as a run, with "stage" and "needs"]}, and the ledgers."""
    from r1hpc.accounting.open_ledger import open_ledger
    from r1hpc.submission.chain.state import read_chain_situation

    now, moment = read_chain_situation(chain), time.time()
    ledgers = {s.name: open_ledger(s.run, moment) for s in now.stages if s.situation is not None}
    stages = []
    for each in now.stages:
        run = as_json(ledgers[each.name], verify) if each.name in ledgers else {}
        about = {"stage": each.name, "needs": list(each.stage.needs), "run_dir": str(each.run.path)}
        stages.append({**run, **about, "state": each.state, "detail": each.detail})
    shown = {
        "chain": chain.name,
        "chain_dir": str(chain.path),
        "state": now.state.value,
        "detail": now.detail,
        "gpu_hours": sum(stage.get("gpu_hours", 0.0) for stage in stages),
        "stages": stages,
    }
    return shown, ledgers


def chain_as_text(shown: dict[str, Any], ledgers: dict[str, RunLedger]) -> str:
    """Return a line for the chain, one per stage, and the results."""
    from r1hpc.reporting.results import read_results, results_text

    rows = [
        (
            stage["stage"],
            stage["state"],
            stage.get("job_id") or "-",
            cell(stage.get("attempt")),
            cell(stage.get("global_step")),
            format_duration(stage["wall_s"]) if stage.get("wall_s") else "-",
            _with_damage(stage),
        )
        for stage in shown["stages"]
    ]
    headings = ("stage", "state", "job", "attempt", "step", "wall", "")
    return "\n".join(
        [
            wrap(f"{shown['chain']}: {shown['state']}  ({shown['detail']})"),
            f"  {shown['chain_dir']}",
            "",
            format_table(headings, rows, right={3, 4, 5}, indent="  "),
            "",
            results_text(read_results(ledgers.values())),
        ]
    ).rstrip()


def results_state(run: RunDir, verify: bool) -> str | None:
    """Return whether the results of a finished run are as it left them; None if it left none."""
    from r1hpc.checkpoint.finished import check_results

    if not run.finished.exists():
        return None
    try:
        checked = check_results(run, by_content=verify)
    except (StateError, OSError) as error:
        return f"{DAMAGED}: {error}"
    if checked.problems:
        return f"{DAMAGED}: {'; '.join(checked.problems[:3])}"
    if not checked.is_on_record:
        return (
            "not verified: finished by an earlier version, which kept no digests" * run.model.is_dir() or None
        )
    if not checked.num_bytes:
        return None
    return "verified" if verify else "sizes as it finished (--verify compares the contents)"


def _with_damage(stage: dict[str, Any]) -> str:
    results = stage.get("results") or ""
    shown = results if results.startswith((DAMAGED, "verified", "not verified")) else ""
    return "; ".join(filter(None, (stage["detail"], shown)))


def as_json(ledger: RunLedger, verify: bool = False) -> dict[str, Any]:
    """Return everything the text shows, under stable names. Times are Unix seconds, None if unknown."""
    from r1hpc.attempt.state.state import State
    from r1hpc.attempt.workload import card_of
    from r1hpc.checkpoint.store import CheckpointStore
    from r1hpc.config.stages import is_server
    from r1hpc.reporting.progress import read_progress
    from r1hpc.serving.address import read_address
    from r1hpc.telemetry.records.evaluations import newest_accuracy

    run, situation = ledger.run, ledger.situation
    history, job = situation.history, situation.job
    now = read_progress(ledger)
    address = read_address(run) if situation.state is State.running else None
    last_facts = (now.recent[-1].extra or {}) if now.recent else {}
    committed = now.global_step or None
    if not now.in_parts:
        committed = next((each.step for each in CheckpointStore(run.checkpoints).list()), None)
    return {
        "run_id": run.run_id,
        "run_dir": str(run.path),
        "state": situation.state.value,
        "detail": situation.detail,
        "attempt": history.last.attempt if history.last else None,
        "global_step": now.global_step,
        "num_steps": now.num_steps,
        "in_parts": now.in_parts,
        "loss": now.recent[-1].loss if now.recent else None,
        "reward": last_facts.get("reward"),
        "accuracy": last_facts.get("accuracy"),
        "held_out": newest_accuracy(run),
        "requests": last_facts.get("requests", 0) if is_server(ledger.stage) else None,
        "url": None if address is None else address.place.url,
        "tokens_per_second": now.tokens_per_second,
        "eta_s": now.eta_s,
        "last_committed_step": committed,
        "job_id": job.job_id if job else None,
        "executor": job.executor if job else None,
        "wall_s": ledger.wall().allocated / 1000,
        "card": dict(card_of(run, ledger.stage)),
        "results": results_state(run, verify),
        "gpu_hours": ledger.gpu_hours,
        "used": ledger.used,
        "unit": ledger.unit,
        "source": ledger.source,
        "notes": list(ledger.notes),
        "attempts": [attempt.to_json() for attempt in history.attempts],
    }


def as_text(ledger: RunLedger, shown: dict[str, Any], now: float) -> str:
    """Return a few lines for a person, as wide as the terminal except for paths."""
    from r1hpc.reporting.text import details_text

    run, situation = ledger.run, ledger.situation
    detail = f"  ({situation.detail})" if situation.detail else ""
    lines = [wrap(f"{run.run_id}: {situation.state.value}{detail}"), f"  {run.path}"]
    if shown["job_id"]:
        lines.append(f"  job {printable(shown['job_id'])} ({printable(shown['executor'] or '?')})")
    lines += _of_its_log(run, situation)
    lines += [f"  {_progress(shown)}", f"  {_kept(shown, run)}"]
    lines += [f"  {name}: {value}" for name, value in shown["card"].items()]
    lines += [wrap(f"results: {shown['results']}", "  ", "    ")] if shown["results"] else []
    if situation.history.attempts:
        rows = [_row(attempt, now, situation.state) for attempt in situation.history.attempts]
        table = format_table(_HEADINGS, rows, right={0, 3, 4, 5, 7}, indent="  ")
        lines += ["", table, *details_text(situation.history.attempts)]
    lines += [wrap(f"note: {note}", hanging="  ") for note in ledger.notes]
    return "\n".join(lines)


def _of_its_log(run: RunDir, situation: Situation) -> list[str]:
    """Return the batch script's last lines if no attempt is active: they say why one cannot begin."""
    from r1hpc.attempt.state.logs import clean, tail
    from r1hpc.attempt.state.state import State

    is_open = situation.state in (State.queued, State.requeued)
    if situation.job is None or not (is_open or situation.never_began):
        return []
    log = run.logs / f"slurm-{situation.job.job_id}.out"
    try:
        said = [clean(line) for line in tail(log, 3) if line.strip()]
    except OSError:
        return []
    return [wrap(f"{log.name} ends: {said[-1][:_MOST_OF_A_LINE]}", "  ", "    ")] if said else []


def _row(attempt: Attempt, now: float, state: State) -> tuple[str, ...]:
    from r1hpc.attempt.state.state import State

    over = attempt.cause is not None
    end = attempt.end if over else (now if state is State.running else None)
    return (
        str(attempt.attempt),
        attempt.cause.value if attempt.cause else "running" if state is State.running else "no recorded end",
        time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.start)),
        format_duration(end - attempt.start) if end is not None else "?",
        str(attempt.nodes),
        str(attempt.gpus),
        f"{attempt.first_step}-{attempt.last_step}" if attempt.first_step is not None else "none",
        cell(attempt.last_committed_step),
    )


def _progress(shown: dict[str, Any]) -> str:
    if shown["requests"] is not None:
        where = f" at {shown['url']}" if shown["url"] else ""
        return f"{shown['requests']} requests answered{where}"
    step, of = shown["global_step"], shown["num_steps"]
    unit = "part" if shown["in_parts"] else "step"
    parts = [f"{unit} {step if step is not None else 0}" + (f" of {of}" if of is not None else "")]
    if step is None and of is None:
        parts = [f"no {unit} on record"]
    if shown["reward"] is not None:  # RL's loss does not show how good the policy is
        parts.append(f"reward {shown['reward']:.3f}")
        parts += [] if shown["accuracy"] is None else [f"accuracy {shown['accuracy']:.3f}"]
    elif shown["loss"] is not None:
        parts.append(f"loss {shown['loss']:.4f}")
    if shown["tokens_per_second"] is not None:
        parts.append(f"{shown['tokens_per_second']:,.0f} tokens/s")
    if shown["eta_s"] is not None:
        parts.append(f"{format_duration(shown['eta_s'])} left")
    return ", ".join(parts)


def _kept(shown: dict[str, Any], run: RunDir) -> str:
    from r1hpc.checkpoint.complete import recorded

    step, used = shown["last_committed_step"], f"{shown['used']:.2f} {shown['unit']} so far"
    if shown["requests"] is not None or shown["in_parts"]:
        return used
    kept = f"checkpoint of step {step} is committed" if step is not None else "no checkpoint yet"
    if step is None and (own := [*recorded(run)]):  # written by a script itself
        kept = f"newest checkpoint {printable(Path(own[-1]).name)}"
    return f"{kept}; {used}"


def _show_all(arguments: Any) -> int:
    from r1hpc.accounting.open_ledger import open_ledgers
    from r1hpc.attempt.state.state import State
    from r1hpc.submission.chain.folder import list_chains
    from r1hpc.sweeps.definition import SweepDir
    from r1hpc.telemetry.diagnosis.summary import names_of

    root = run_root_of(arguments.run_root)
    now, pattern, state = time.time(), arguments.run_dir or "*", arguments.state
    if state and state not in [*State]:
        raise UsageError(f"--state {printable(state)}: one of {', '.join(State)}")

    def is_wanted(path: Path) -> bool:
        return fnmatchcase(full_name(RunDir(path)), pattern)

    # Chosen by name or stage, the runs inside chains and sweeps are shown too.
    is_open = arguments.run_dir or arguments.stage
    runs = [run for run in (all_runs(root) if is_open else list_runs(root)) if is_wanted(run.path)]
    if arguments.stage:
        runs = [run for run in runs if names_of(run)[0] == arguments.stage]
    folders = [] if arguments.stage else [each for each in list_chains(root) if is_wanted(each.path)]
    points = [] if arguments.stage or state else filter(is_wanted, folders_with(root, SWEEP))
    ledgers, notes = open_ledgers(runs[:_MOST_RUNS], now, ask=False)
    shown = [as_json(ledger) for ledger in ledgers if state in (None, ledger.state)]
    chains = _readable(folders[:_MOST_RUNS], lambda chain: _chain_now(chain)[0], notes)
    chains = [chain for chain in chains if state in (None, chain["state"])]
    sweeps = _readable(map(SweepDir, sorted(points)), _sweep_as_json, notes)
    notes += unreadable(root)
    notes += [
        f"these are the newest {_MOST_RUNS} {what} of {len(found)}: name one of the others to see it"
        for what, found in (("runs", runs), ("chains", folders))
        if len(found) > _MOST_RUNS
    ]
    if arguments.json:
        found = {"runs": shown, "chains": chains, "sweeps": sweeps}
        print_json({"run_root": str(root.absolute()), **found, "notes": notes})
        return 0
    if not (shown or chains or sweeps):
        chosen = " that fit" if arguments.run_dir or state or arguments.stage else ""
        print(f"no runs{chosen} under {root.absolute()}")
    else:
        headings = ("run", "state", "attempt", "step", "of", "loss or reward", "held-out", "GPU-hours")
        rows = [*map(_run_row, shown), *map(_chain_row, chains), *map(_sweep_row, sweeps)]
        print(coloured(format_table(headings, rows, right={2, 3, 4, 5, 6, 7})))
    for note in notes:
        print(wrap(f"note: {note}", hanging="  "))
    return 0


def _readable(
    folders: Iterable[_Folder], read: Callable[[_Folder], dict[str, Any]], notes: list[str]
) -> list[dict[str, Any]]:
    """Return what `read` does of each folder; add a note for one that cannot be read."""
    found = []
    for folder in folders:
        try:
            found.append(read(folder))
        except (R1hpcError, OSError) as error:  # a colleague's, or from another version: show the others
            why = error.strerror if isinstance(error, OSError) else error
            notes.append(f"{folder.path} is left out: {why}")
    return found


def _chain_row(shown: dict[str, Any]) -> tuple[str, ...]:
    from r1hpc.attempt.state.state import State

    states = [stage["state"] for stage in shown["stages"]]
    done = str(states.count(State.finished.value))
    name = f"{shown['chain']} (chain)"
    accuracy = next((s["held_out"] for s in reversed(shown["stages"]) if s.get("held_out")), "-")
    return (name, shown["state"], "-", done, str(len(states)), "-", accuracy, f"{shown['gpu_hours']:.2f}")


def _sweep_as_json(sweep: SweepDir) -> dict[str, Any]:
    runs = [sweep.stage(point.name) for point in sweep.read().points()]
    finished = sum(run.finished.exists() for run in runs)
    return {"sweep": sweep.name, "sweep_dir": str(sweep.path), "finished": finished, "points": len(runs)}


def _sweep_row(shown: dict[str, Any]) -> tuple[str, ...]:
    done, of = shown["finished"], shown["points"]
    state = "finished" if done == of else "unfinished"
    return (f"{shown['sweep']} (sweep)", state, "-", str(done), str(of), "-", "-", "-")


def _run_row(shown: dict[str, Any]) -> tuple[str, ...]:
    loss = cell(shown["loss"], ".4f")
    if shown["reward"] is not None:  # RL's loss says nothing
        loss = f"{shown['reward']:.3f} reward"
    numbers = (cell(shown[key]) for key in ("attempt", "global_step", "num_steps"))
    name, accuracy = full_name(RunDir(shown["run_dir"])), shown["held_out"] or "-"
    return (name, shown["state"], *numbers, loss, accuracy, f"{shown['gpu_hours']:.2f}")


if __name__ == "__main__":
    run_command(main)
