"""Submit a chain file, or continue an existing chain by its name; submit.py calls it.

chain_steps.py decides what each stage needs. A new chain may begin with finished stages of an earlier one. A
reused stage is a link in the chain's folder: it is finished, so nothing runs, and the stages after it read
what it left.
"""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1hpc.accounting.open_ledger import open_ledger
from r1hpc.attempt.state.state import newest_job, read_situation
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.config import load, paths, plugins
from r1hpc.slurm import defaults
from r1hpc.slurm.client import SlurmError
from r1hpc.submission import start_run
from r1hpc.submission.chain.file import (
    Definition,
    by_its_first_path,
    digest_of,
    no_stage,
    open_definition,
    override,
    read_definition,
    renamed,
    save_definition,
    stages_before,
)
from r1hpc.submission.chain.folder import SUBMISSION, ChainDir, held, supervisor_pid
from r1hpc.submission.chain.state import old_stages
from r1hpc.submission.chain_steps import Action, StageStep, carry_out_on_slurm, plan_steps
from r1hpc.submission.order import Order, Purpose
from r1hpc.submission.plan_run import check_budget, show_to_slurm
from r1hpc.submission.resume import OF_THE_PLACE, changed_keys, flat, forbidden_changes
from r1hpc.telemetry.records.attempts import record


@dataclass(frozen=True)
class SubmittedChain:
    chain: ChainDir
    executor: str
    steps: tuple[StageStep, ...]
    jobs: dict[str, str]
    """Job IDs of the unfinished stages. Empty after a dry run."""
    notes: tuple[str, ...]
    is_dry_run: bool = False


def submit_chain(chain: ChainDir, source: Path | None, order: Order) -> SubmittedChain:
    """Begin a chain, or continue an existing one; without `source` as it is frozen.

    Raise UsageError if there is none, or it is another one, or a stage cannot run as described. Raise
    R1hpcError if Slurm refuses, or does not answer.
    """
    # A chain goes on where it was submitted last.
    before = [str(event["executor"]) for event in chain.recorded("submitted") if "executor" in event]
    asked = before[-1] if before and order.executor == "auto" else order.executor
    executor, notes = defaults.choose_executor(asked, will_submit=order.purpose is Purpose.start)
    order = replace(order, executor=executor)
    if chain.definition.is_file():
        if order.reuse or order.from_stage:
            raise UsageError(f"{chain.name} exists: give the new chain another name, --run-name NAME")
        return _go_on(by_its_first_path(chain), source, order, notes)
    if source is None or order.resume:
        raise UsageError(f"there is no chain called {chain.name} in {chain.path.parent}")
    return _begin(chain, source, order, notes)


def _begin(chain: ChainDir, source: Path, order: Order, notes: Sequence[str]) -> SubmittedChain:
    if os.path.lexists(chain.path):
        _clear_leftovers(chain)
    definition = read_definition(source, chain, order.overrides, order.cluster)
    reused = _find_reused(definition, order)
    notes = [*notes, *_notes_on_reused(reused, definition, chain)]
    steps, said = _plan(chain, definition, order, reused=reused)
    if order.is_dry_run:
        return SubmittedChain(chain, order.executor, steps, {}, (*notes, *said), is_dry_run=True)
    start_run.create_parent(RunDir(chain.path))
    chain.path.mkdir(mode=0o700, exist_ok=True)
    with held(chain, SUBMISSION) as lock:
        if chain.definition.is_file():
            raise UsageError(f"another submission has just begun {chain.name}: submit it again to go on")
        for name, run in reused.items():
            chain.stage(name).path.symlink_to(run.path)
        failpoint("chain.linked")
        save_definition(definition, chain)
        failpoint("chain.frozen")
        try:
            jobs = _carry_out(chain, steps, order, lock)
        except (R1hpcError, OSError):
            if not any(chain.stage(name).path.exists() for name in definition.names if name not in reused):
                shutil.rmtree(chain.path)  # nothing came of it
            raise
    return SubmittedChain(chain, order.executor, steps, jobs, (*notes, *said))


def _go_on(chain: ChainDir, source: Path | None, order: Order, notes: Sequence[str]) -> SubmittedChain:
    moved = renamed(chain)
    frozen = open_definition(chain)
    old = old_stages(chain, frozen.stages)
    notes = [*notes, *moved, *_old(chain, old, order)]
    notes += [*_changed_since(frozen, source, chain), *_changed_code(frozen, chain)]
    definition = override(frozen, order.overrides, chain, order.cluster)
    if order.is_dry_run:
        steps, said = _plan(chain, definition, order, frozen)
        return SubmittedChain(chain, order.executor, steps, {}, (*notes, *said), is_dry_run=True)
    pid = supervisor_pid(chain)
    if pid is not None:
        if order.redo:
            raise UsageError(f"{chain.name} is at work (process {pid}): --redo takes a chain that is not")
        return _supervised(chain, frozen, order, pid, notes)
    with held(chain, SUBMISSION) as lock, _aside(chain, old if order.redo else ()):
        steps, said = _plan(chain, definition, order, frozen)
        # A finished or running stage stays as it is, whatever was ordered for all of them.
        stages = (s.stage if s.action.makes_a_job else frozen.stage(s.stage.name) for s in steps)
        definition = replace(definition, stages=tuple(stages))
        if definition != frozen:
            save_definition(definition, chain)
        jobs = _carry_out(chain, steps, order, lock)
    return SubmittedChain(chain, order.executor, steps, jobs, (*notes, *said))


def _old(chain: ChainDir, old: Mapping[str, str], order: Order) -> list[str]:
    """Return a note on each old stage, with what it has cost."""
    notes = []
    for name, why in old.items():
        ledger = open_ledger(chain.stage(name), time.time())
        cost = f"it took {ledger.used:.2f} {ledger.unit}"
        will = "runs again, and its result is kept aside" if order.redo else "--redo runs it again"
        notes.append(f"stage {name} is {why}; {cost}; {will}")
    return notes


@contextlib.contextmanager
def _aside(chain: ChainDir, names: Iterable[str]) -> Iterator[None]:
    """Move stages to STAGE.old-<n>, so that they are submitted anew; back, if nothing came of that."""
    moves = []
    for name in names:
        path = chain.stage(name).path
        number = next(n for n in itertools.count(1) if not os.path.lexists(f"{path}.old-{n}"))
        moves.append((path, path.rename(f"{path}.old-{number}")))
    try:
        yield
    except (R1hpcError, OSError):
        for path, kept in moves:
            if not path.exists():
                kept.rename(path)
        raise


def _plan(
    chain: ChainDir,
    definition: Definition,
    order: Order,
    frozen: Definition | None = None,
    reused: Collection[str] = (),
) -> tuple[tuple[StageStep, ...], tuple[str, ...]]:
    """Return the action for each stage, within the budget for all together, and the notes."""
    steps = plan_steps(chain, definition, order, reused)
    kept = [] if frozen is None else _kept_as_they_are(frozen, steps)
    planned = [step.planned for step in steps if step.planned is not None]
    said = check_budget(planned, order.counted_root, order.over_budget)
    heard = _slurm_says(steps) if order.is_dry_run else []
    return steps, (*kept, *said, *_merged_notes(steps), *heard)


def _slurm_says(steps: Sequence[StageStep]) -> list[str]:
    """Return Slurm's answer for each stage that gets a job; a start time only if it waits for no other."""
    notes = []
    awaited = {step.stage.name for step in steps if step.action is not Action.skip}
    for step in steps:
        if step.planned is None:
            continue
        try:
            said = show_to_slurm(step.planned)
        except SlurmError as error:
            raise R1hpcError(f"stage {step.stage.name}: {error}") from None
        if said is None or not said.was_heard:
            return [said.sentence] if said else []
        if not (said.starts and awaited & set(step.stage.needs)):
            notes.append(f"{said.sentence} ({step.stage.name})")
    return notes


def _carry_out(chain: ChainDir, steps: Sequence[StageStep], order: Order, lock: int) -> dict[str, str]:
    if order.executor == "slurm":
        return carry_out_on_slurm(chain, steps, order)
    open_steps = [step for step in steps if step.action is not Action.skip]
    at_work = {step.stage.name: step.job_id for step in open_steps if step.job_id is not None}
    if not any(step.action.makes_a_job for step in open_steps):
        return at_work
    planned = [step.planned for step in steps if step.planned is not None]
    job_id = start_run.supervise(chain, planned, [step.run for step in open_steps], order, lock)
    for each in planned:
        chain.record("submitted", stage=each.run.run_id, job_id=job_id, executor="local")
    return {step.stage.name: step.job_id or job_id for step in open_steps}


def _supervised(
    chain: ChainDir, definition: Definition, order: Order, pid: int, notes: Sequence[str]
) -> SubmittedChain:
    """Complete the records that a kill may have cut off; the running supervisor needs nothing else."""
    if order.overrides:
        raise UsageError(
            f"{chain.name} is at work (process {pid}) and takes no settings now: submit it without any, or "
            f"cancel it first (python -m r1hpc.cancel {chain.path})"
        )
    begun, notes = chain.recorded("supervising"), list(notes)
    steps = []
    for stage in definition.stages:
        run = chain.stage(stage.name)
        if run.finished.exists():
            steps.append(StageStep(stage, run, Action.skip))
            continue
        job = newest_job(run)
        if job is None or (begun and job.time < begun[-1]["time"] and job.job_id != f"local-{pid}"):
            record(run, "submitted", executor="local", job_id=f"local-{pid}", script=str(run.script))
            job = newest_job(run)
        ended = read_situation(run).state
        if ended.is_over:
            notes.append(
                f"stage {stage.name} is {ended.value}: submit {chain.name} again once process {pid}, "
                "which is at work on other stages, has ended"
            )
        steps.append(StageStep(stage, run, Action.leave, job_id=job.job_id if job is not None else None))
    jobs = {step.stage.name: step.job_id for step in steps if step.job_id is not None}
    return SubmittedChain(chain, "local", tuple(steps), jobs, tuple(notes))


def _changed_since(frozen: Definition, source: Path | None, chain: ChainDir) -> list[str]:
    """Return a note if the chain file differs from the frozen one; raise if it is another chain's."""
    if source is None or digest_of(source) == frozen.digest:
        return []
    if str(source.absolute()) != frozen.source:
        raise UsageError(
            f"{chain.name} is a chain of {printable(frozen.source)}, not of {printable(str(source))}: "
            "choose another --run-name"
        )
    return [
        f"{source} has changed since {chain.name} was begun: it goes on as frozen in {chain.definition}; "
        "for the new file take another --run-name"
    ]


def _changed_code(frozen: Definition, chain: ChainDir) -> list[str]:
    """Return a note on each finished stage whose reward, task or questions are not as in their files now."""
    notes = []
    for stage in frozen.stages:
        run = chain.stage(stage.name)
        if not run.finished.exists():
            continue  # refused when it is planned
        try:
            plugins.refuse_changes(paths.names_in(stage.config), run.code)
            plugins.refuse_changed_files(run.code)
        except (R1hpcError, OSError) as error:
            what = str(error).partition(": ")[0]
            again = f"--run-name NAME --from {chain.name}:{stage.name} runs it again with them"
            notes.append(f"stage {stage.name} is finished: {what}. For a new chain: {again}")
    return notes


def _kept_as_they_are(frozen: Definition, steps: Sequence[StageStep]) -> list[str]:
    """Return a sentence for each running stage that was given other settings.

    Raise UsageError if a stage without a new job was given settings that would make it another run.
    """
    notes = []
    for step in steps:
        if step.action.makes_a_job:
            continue
        before, given = frozen.stage(step.stage.name).config, step.stage.config
        wrong = forbidden_changes(before, given)
        if before.train.num_steps != given.train.num_steps:
            wrong.append("train.num_steps")
        if wrong:
            raise UsageError(
                f"stage {step.stage.name} is {step.action}: {', '.join(wrong)} cannot change any more. "
                "Give what is meant for one stage as STAGE:KEY=VALUE, or take another --run-name"
            )
        changed = changed_keys(before, given)
        if changed and step.action in (Action.leave, Action.adopt):
            notes.append(
                f"stage {step.stage.name} is at work or in the queue and keeps its {', '.join(changed)}: "
                f"for other ones cancel it first (python -m r1hpc.cancel {step.run.path})"
            )
    return notes


def _clear_leftovers(chain: ChainDir) -> None:
    """Remove the links of a submission that was killed before it wrote chain.yaml; refuse another folder."""
    left = [path for path in chain.path.iterdir() if path != chain.lock] if chain.path.is_dir() else None
    if left is None or not all(path.is_symlink() for path in left):
        raise UsageError(
            f"there is a run called {chain.name} in {chain.path.parent} that is no chain: "
            "choose another --run-name"
        )
    if left:
        with held(chain, SUBMISSION):
            for path in left if not chain.definition.is_file() else ():
                path.unlink(missing_ok=True)


def _merged_notes(steps: Sequence[StageStep]) -> list[str]:
    """Return each sentence once, with its stages unless it concerns all."""
    planned = [(step.stage.name, step.planned) for step in steps if step.planned is not None]
    stages: dict[str, list[str]] = {}
    for name, each in planned:
        for note in each.notes:
            stages.setdefault(note, []).append(name)
    return [
        note if len(names) == len(planned) else f"{note} ({', '.join(names)})"
        for note, names in stages.items()
    ]


def _find_reused(definition: Definition, order: Order) -> dict[str, RunDir]:
    """Return the finished runs that take the place of stages, by stage.

    Raise UsageError if there is no such chain or stage, or it is not finished.
    """
    found: dict[str, RunDir] = {}
    if order.from_stage is not None:
        name, chain = _named(order.from_stage, Path(definition.source).stem, definition, order)
        again = [each for each in definition.names if name in (each, *stages_before(each, definition.needs))]
        kept = [each for each in definition.names if each not in again]
        found |= {each: chain.stage(each) for each in kept if chain.stage(each).finished.exists()}
        missing = [each for each in stages_before(name, definition.needs) if each not in found]
        if missing:
            raise UsageError(
                f"--from {name}: {chain.name} has not finished {missing[0]}, which comes before it"
            )
    for item in order.reuse:
        if ":" not in item:
            raise UsageError(f"--reuse {printable(item)}: write CHAIN:STAGE")
        name, chain = _named(item, "", definition, order)
        found[name] = chain.stage(name)
        if not found[name].finished.exists():
            raise UsageError(f"--reuse {printable(item)}: it has not finished, so there is nothing to reuse")
    return {name: open_run(run.path.resolve()) for name, run in found.items()}


def _named(given: str, usual: str, definition: Definition, order: Order) -> tuple[str, ChainDir]:
    chain_name, _, stage = given.rpartition(":")
    if stage not in definition.names:
        raise UsageError(no_stage(stage, definition.names))
    chain = ChainDir.find(chain_name or usual, order.run_root)
    if chain is None:
        raise UsageError(
            f"there is no chain {printable(chain_name or usual)} under {order.run_root.absolute()}: name one "
            f"as CHAIN:{stage}"
        )
    return stage, chain


def _notes_on_reused(reused: Mapping[str, RunDir], definition: Definition, chain: ChainDir) -> list[str]:
    """Return a sentence on each reused stage, with the settings that the file has otherwise."""
    notes = []
    for name, run in reused.items():
        before, other = flat(load.read(run.config)), run.path.parent
        changed = [
            key
            for key, value in sorted(flat(definition.stage(name).config).items())
            if not key.startswith(OF_THE_PLACE)
            and value not in (None, before.get(key))  # None: derived at submission
            and str(before.get(key)).replace(f"{other}/", f"{chain.path}/") != str(value)
        ]
        differs = f", which ran with another {', '.join(changed)}" if changed else ""
        notes.append(f"stage {name} is that of {other.name}{differs}")
    return notes
