"""Use r1hpc from Python: submit runs and chains, read their state, wait, cancel. The commands use it too.

    from r1hpc import Run, submit

    done = submit("jobs/smoke.yaml", nodes=2, overrides={"train.num_steps": 20}, run_root="runs")
    done.plan.num_steps, done.estimate, done.job_id
    done.run.wait()                       # State.finished

    run = Run("runs/smoke-1")
    run.state(), run.attempts, run.gpu_hours
    [step.loss for step in run.metrics()]
    run.resume(nodes=4, overrides={"train.num_steps": 40}).run.wait()

Every error that a user can cause is an R1hpcError; its message names the fix. See docs/api.md.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from r1hpc.base.choose_run import choose_run
from r1hpc.base.cli import print_json, print_result
from r1hpc.base.run_dir import RunDir, run_root_of
from r1hpc.submission.chain.folder import ChainDir, choose_chain

# Calls import what they need: reading a run's state loads no estimator.
if TYPE_CHECKING:
    from r1hpc.attempt.state.cancel import Cancellation
    from r1hpc.attempt.state.state import Situation, State
    from r1hpc.plan.run import RunPlan
    from r1hpc.submission.chain.state import ChainSituation
    from r1hpc.submission.plan_run import PlannedRun
    from r1hpc.submission.submit import SubmittedRun
    from r1hpc.submission.submit_chain import SubmittedChain
    from r1hpc.telemetry.records.attempts import Attempt
    from r1hpc.telemetry.records.metrics import Step

Overrides = Mapping[str, Any] | Sequence[str]
"""{"train.lr": 3e-5, "grpo:train.lr": 1e-6} or ["train.lr=3e-5"], as on the command line."""


class Run:
    """One run, by its folder or its name under the run root. Nothing is cached."""

    def __init__(self, path: str | Path, run_root: str | Path | None = None) -> None:
        """Raise UsageError if there is no such run, StateError if others may write its folder."""
        self.folder: RunDir = choose_run(str(path), None if run_root is None else str(run_root))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    def state(self) -> State:
        """Return queued, running, requeued, finished, stopped, cancelled, failed or unknown.

        Waits at most 5 seconds for Slurm; without its answer the state comes from the run folder.
        """
        return self.situation().state

    def situation(self) -> Situation:
        """Return the state and the facts behind it."""
        from r1hpc.attempt.state.state import read_situation

        return read_situation(self.folder)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Return every attempt so far: when and where it ran, its steps, and why it ended."""
        return self.situation().history.attempts

    @property
    def gpu_hours(self) -> float:
        """Return the GPU-hours so far, including the current attempt; from Slurm's accounting if known."""
        from r1hpc.accounting.open_ledger import settled_ledger

        return settled_ledger(self.folder, time.time()).gpu_hours

    def metrics(self) -> list[Step]:
        """Return the optimizer steps behind the current weights, in order."""
        from r1hpc.telemetry.records.metrics import read_steps

        steps = read_steps(self.folder).effective
        return [steps[number] for number in sorted(steps)]

    def wait(self, timeout_s: float | None = None) -> State:
        """Wait until the run is over and the end of its last attempt is recorded; return its state.

        Raises:
            R1hpcError: it is not over after `timeout_s`.
        """
        from r1hpc.attempt.state.state import wait

        return wait(self.folder, timeout_s).state

    def follow(self, out: TextIO = sys.stdout) -> int:
        """Print progress until it is over; 0 finished, 1 ended otherwise, 130 interrupted by Ctrl-C."""
        from r1hpc.reporting.follow import follow

        job = self.situation().job
        return follow(self.folder, job.job_id if job is not None else "", out)

    def cancel(self, save_first: bool = False) -> Cancellation:
        """End its job without a requeue; with `save_first` the run saves and ends by itself.

        Raises:
            StateError: there is no job, or it is not yours or not this run's.
        """
        from r1hpc.attempt.state.cancel import cancel

        return cancel(self.folder, save_first)

    def resume(self, *, nodes: int | None = None, overrides: Overrides = (), **options: Any) -> Submission:
        """Continue the run, perhaps on other nodes or with more steps. Takes the options of `submit`."""
        where: dict[str, Any] = {"run_root": self.path.parent, "run_name": self.run_id, "resume": True}
        done = submit(nodes=nodes, overrides=overrides, **where, **options)
        assert isinstance(done, Submission), "a chain is not resumed but submitted again"
        return done


class Chain:
    """A chain of stages; each is a run: chain["sft"].state()."""

    def __init__(self, folder: ChainDir) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"Chain({str(self.path)!r})"

    def __getitem__(self, stage: str) -> Run:
        return Run(self.folder.stage(stage).path)

    def __iter__(self) -> Iterator[str]:
        from r1hpc.submission.chain.file import open_definition

        return (stage.name for stage in open_definition(self.folder).stages)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        return self.folder.name

    def state(self) -> State:
        """Return finished if all stages are, running if any is active, else the first unfinished's state."""
        return self.situation().state

    def situation(self) -> ChainSituation:
        """Return the state of the chain and of each stage."""
        from r1hpc.submission.chain.state import read_chain_situation

        return read_chain_situation(self.folder)

    def results(self) -> str:
        """Return the table of results, for a terminal."""
        from r1hpc.accounting.open_ledger import open_ledger
        from r1hpc.reporting.results import read_results, results_text

        runs = [stage.run for stage in self.situation().stages if stage.situation is not None]
        return results_text(read_results(open_ledger(run, time.time()) for run in runs))

    def cancel(self, save_first: bool = False) -> dict[str, Cancellation]:
        """Cancel every stage that waits or runs, the last one first."""
        from r1hpc.submission.chain.state import cancel_chain

        return cancel_chain(self.folder, save_first)


@dataclass(frozen=True)
class Submission:
    """The result of `submit` for a run."""

    submitted: SubmittedRun

    @property
    def planned(self) -> PlannedRun:
        return self.submitted.planned

    @property
    def run(self) -> Run:
        """Return the run; raise an error after a dry run, which creates none."""
        return Run(self.planned.run.path)

    @property
    def job_id(self) -> str | None:
        """Slurm's job ID, or local-PID; None after a dry run."""
        return self.submitted.job_id

    @property
    def plan(self) -> RunPlan:
        return self.planned.plan

    @property
    def estimate(self) -> dict[str, Any] | None:
        """The content of estimate.json; None if unknown."""
        return self.planned.estimate

    @property
    def script(self) -> str:
        """The text of the job script."""
        from r1hpc.slurm.script import render

        return render(self.planned.script)

    def print(self, as_json: bool = False) -> None:
        """Print the command's output."""
        from r1hpc.submission.text import run_as_object, run_as_text

        done = (self.submitted.planned, self.submitted.job_id)
        if as_json:
            print_json(run_as_object(*done))
        else:
            print(run_as_text(*done))

    def follow(self, out: TextIO = sys.stdout) -> int:
        """Like Run.follow."""
        from r1hpc.reporting.follow import follow

        return follow(self.planned.run, self.job_id or "", out)


@dataclass(frozen=True)
class ChainSubmission:
    """The result of `submit` for a chain."""

    submitted: SubmittedChain

    @property
    def chain(self) -> Chain:
        return Chain(self.submitted.chain)

    @property
    def job_ids(self) -> dict[str, str]:
        """The job ID of each unfinished stage; empty after a dry run."""
        return dict(self.submitted.jobs)

    @property
    def planned(self) -> dict[str, PlannedRun]:
        """Plan, script and estimate of each stage that gets a job."""
        return {s.stage.name: s.planned for s in self.submitted.steps if s.planned is not None}

    def print(self, as_json: bool = False) -> None:
        """Print the command's output."""
        from r1hpc.submission.text import chain_as_object, chain_as_text

        print_result(chain_as_object(self.submitted), chain_as_text(self.submitted), as_json)

    def follow(self, out: TextIO = sys.stdout) -> int:
        """Print progress, stage after stage; return 0 when all stages have finished."""
        from r1hpc.reporting.follow import INTERRUPTED, follow

        chain, jobs = self.submitted.chain, self.submitted.jobs
        missing: set[str] = set()
        now = self.chain.situation()
        for stage in now.stages:
            if missing.intersection(stage.stage.needs):
                missing.add(stage.name)
            elif stage.name in jobs:
                print(f"== {stage.name} ==", file=out, flush=True)
                status = follow(stage.run, jobs[stage.name], out)
                if status == INTERRUPTED:
                    return status
                if status:
                    missing.add(stage.name)
        now = self.chain.situation()
        summary = f"{chain.name}: {now.state} ({now.detail})\n"
        print(summary, self.chain.results(), sep="\n", file=out, flush=True)
        return 0 if now.state == "finished" else 1


def submit(
    job: str | Path | None = None,
    *,
    nodes: int | None = None,
    overrides: Overrides = (),
    run_root: str | Path | None = None,
    run_name: str | None = None,
    resume: bool = False,
    executor: str = "auto",
    cluster: str | None = None,
    over_budget: str | None = None,
    dry_run: bool = False,
    argv: Sequence[str] = (),
    from_stage: str | None = None,
    reuse: Sequence[str] = (),
    redo: bool = False,
) -> Submission | ChainSubmission:
    """Check, plan, compare with the budget, freeze and start a run or a chain.

    Args:
        job: a job or chain file, or its name in jobs/; None: jobs/train.yaml, or `run_name`'s frozen job.
        nodes: like --nodes, overrides the job file.
        overrides: other settings to change, by dotted keys.
        run_root: folder of all runs; None: $R1HPC_RUN_ROOT, else ./runs.
        run_name: None: a new name, JOB-DATE-TIME-XXXX.
        resume: continue the run of `run_name`.
        executor: slurm, local, or auto: Slurm if there is one.
        cluster: a profile in configs/cluster/; None: $R1HPC_CLUSTER.
        over_budget: the reason to exceed the budget.
        dry_run: plan only and write nothing. Slurm, if there is one, tests whether it would take the job.
        argv: a command line, recorded in environment.json.
        from_stage: for a new chain: STAGE or CHAIN:STAGE; the stages before it are those of an earlier chain.
        reuse: for a new chain: CHAIN:STAGE, finished stages that it takes from others.
        redo: run the stages of a chain again whose input has changed since; their results are kept aside.

    Returns:
        A Submission, or for a chain a ChainSubmission.

    Raises:
        UsageError: the request is impossible; the message says what to change.
        R1hpcError: the budget is too small, or Slurm refuses or does not answer.
    """
    from r1hpc.submission.order import Order, Purpose
    from r1hpc.submission.submit import SubmittedRun
    from r1hpc.submission.submit import submit as submit_order

    if isinstance(overrides, Mapping):
        # JSON survives YAML: a bare 12:00:00 would be read as a number to base 60.
        overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    changes = [*overrides, *([f"resources.nodes={nodes}"] if nodes is not None else [])]
    order = Order(
        purpose=Purpose.dry_run if dry_run else Purpose.start,
        executor=executor,
        argv=tuple(argv),
        overrides=tuple(changes),
        cluster=cluster,
        run_root=run_root_of(run_root),
        over_budget=over_budget,
        job=None if job is None else str(job),
        run_name=run_name,
        resume=resume,
        from_stage=from_stage,
        reuse=tuple(reuse),
        redo=redo,
    )
    # Only the user may read a run's files, whatever the umask of the calling program.
    before = os.umask(0o077)
    try:
        done = submit_order(order)
    finally:
        os.umask(before)
    return Submission(done) if isinstance(done, SubmittedRun) else ChainSubmission(done)


def open_run_or_chain(given: str | None, run_root: str | None) -> Run | Chain:
    """Return the run or chain of this folder or name; without one, the newest under the run root."""
    chain = choose_chain(given, run_root)
    return Run(choose_run(given, run_root).path) if chain is None else Chain(chain)
