"""Prove on your own cluster that a preempted job loses nothing; the proof is in the records of its runs.

    python -m r1hpc.drill jobs/smoke.yaml                # on Slurm, or on this machine without one
    python -m r1hpc.drill jobs/smoke.yaml --way preempt  # only one way of preemption

Submits a shortened job up to four times: one run undisturbed; one that is preempted, killed and requeued as
far as the site lets a user do it; one with too short a time limit; one cancelled while it is being preempted.
Then it compares loss and gradient norm to the last bit, every sample consumed once, the recorded causes, and
no attempt after the cancel. It lists the ways of preemption exercised, and why the others were not. Exit
status 0: passed. It costs the GPU-hours of these runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import (
    ArgumentParser,
    add_cluster,
    add_json,
    add_run_root,
    offer,
    print_result,
    run_command,
)
from r1hpc.base.errors import R1hpcError, StateError, UsageError

if TYPE_CHECKING:
    from r1hpc.api import Run
    from r1hpc.attempt.state.state import JobRef
    from r1hpc.preflight.disturb import Check, Done

_WAYS = ("usr2", "term", "preempt", "limit")
"""The signal of --signal, the SIGTERM of a grace time, a job of another QOS, the time limit."""
_PATIENCE_S = 3600.0
"""Seconds to wait for the next event, not counting the time in the queue."""
_AFTER_CANCEL_S = 5.0
_ASK_EVERY_S = 5.0


def main(argv: Sequence[str]) -> int:
    arguments, of_script = _parser().parse_command(argv, "r1hpc.script.launcher")
    arguments.overrides += of_script
    if arguments.steps < 20:
        raise UsageError(
            f"--steps {arguments.steps}: at least 20, so that each disturbance has steps around it"
        )
    shortened = _shortened(arguments)
    ways = tuple(dict.fromkeys(arguments.way or _WAYS))
    from r1hpc.attempt.state.unended import corrected_history
    from r1hpc.attempt.workload import REPORTS_NO_STEPS
    from r1hpc.preflight.disturb import judge_attempts, judge_cancel, judge_records

    name = f"drill-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    quiet = _submit(arguments, f"{name}-quiet", shortened)
    if _wait_over(quiet) != "finished":
        raise R1hpcError(
            f"the undisturbed run did not finish, so there is nothing to compare with: see "
            f"python -m r1hpc.status {quiet.path}"
        )
    if not quiet.metrics():
        raise UsageError(f"{arguments.job} {REPORTS_NO_STEPS}")
    runs = [quiet]
    checks: list[Check] = []
    done: list[Done] = []
    if set(ways) != {"limit"}:
        disturbed = _submit(arguments, f"{name}-disturbed", shortened)
        done = _disturb(disturbed, arguments.steps, ways, only_ways=bool(arguments.way))
        _wait_over(disturbed)
        runs.append(disturbed)
        checks = judge_attempts(disturbed.attempts, done, _save_every(arguments.steps))
        checks += judge_records(quiet.folder, disturbed.folder)
    if "limit" in ways:
        limited, at_limit, of_limit = _limit(arguments, f"{name}-limited", shortened, quiet)
        runs += [limited] if limited is not None else []
        done, checks = [*done, at_limit], [*checks, *of_limit]
    cancelled = _submit(arguments, f"{name}-cancelled", shortened)
    runs.append(cancelled)
    _preempt_and_cancel(cancelled)
    checks.append(judge_cancel(corrected_history(cancelled.folder), cancelled.state().value))
    exercised = [
        {"way": each.way, "exercised": each.refused is None, "why": each.refused or ""}
        for each in done
        if each.way is not None
    ]
    # A way requested by name must have been exercised.
    passed = all(check.passed for check in checks) and (
        not arguments.way or all(each["exercised"] for each in exercised)
    )
    value = {
        "passed": passed,
        "job": arguments.job,
        "ways": exercised,
        "checks": [asdict(check) for check in checks],
        "not_done": [{"what": each.name, "why": each.refused} for each in done if each.refused is not None],
        "runs": [str(run.path) for run in runs],
    }
    print_result(value, as_text(value), arguments.json)
    return 0 if passed else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.drill", description=__doc__)
    job = parser.add_argument("job", metavar="JOB.yaml | SCRIPT.py", help="job file or script")
    overrides = parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    for words in (job, overrides):
        offer(words, "r1hpc.config.assets:job_words")
    parser.add_argument("-N", "--nodes", type=int, metavar="N", help="overrides the job file")
    parser.add_argument("--steps", type=int, default=60, metavar="K", help="optimizer steps of each run (60)")
    parser.add_argument(
        "--way",
        action="append",
        choices=_WAYS,
        help="preempt it in this way and no other (repeatable); default: in each that works here",
    )
    parser.add_argument("--executor", choices=("auto", "slurm", "local"), default="auto")
    add_cluster(parser)
    add_run_root(parser)
    add_json(parser)
    return parser


def _save_every(steps: int) -> int:
    return max(1, steps // 6)


def _submit(arguments: Any, name: str, shortened: Sequence[str], *more: str) -> Run:
    from r1hpc.api import Submission, submit
    from r1hpc.slurm.flags import overrides_from_environment

    done = submit(
        arguments.job,
        nodes=arguments.nodes,
        overrides=[*overrides_from_environment(os.environ), *arguments.overrides, *shortened, *more],
        run_root=arguments.run_root,
        run_name=name,
        executor=arguments.executor,
        cluster=arguments.cluster,
    )
    assert isinstance(done, Submission), "_shortened refuses a chain"
    return done.run


def _shortened(arguments: Any) -> list[str]:
    """Return the overrides by which each run of the drill takes --steps steps and saves six times.

    Raise UsageError for a chain, and for a stage whose runs cannot be compared step by step.
    """
    from r1hpc.attempt.workload import workload_of
    from r1hpc.config.assets import find_job
    from r1hpc.config.load import is_chain_file, load

    if is_chain_file(find_job(arguments.job)):
        raise UsageError(f"{arguments.job} is a chain: give the job file of one of its stages")
    config = load(arguments.job, arguments.overrides, arguments.cluster)
    own = workload_of(config.stage).shortened(config, arguments.steps)
    return [*own, f"checkpoint.save_every={_save_every(arguments.steps)}"]


def _disturb(run: Run, steps: int, ways: Sequence[str], only_ways: bool) -> list[Done]:
    """Apply each disturbance at its own step, once the attempt before it has taken steps."""
    from r1hpc.preflight.disturb import Done, disturbances
    from r1hpc.slurm.client import SlurmError, without_advice

    done: list[Done] = []
    job, why_not = _job(run), None
    preemptor: tuple[str, ...] = ()
    if "preempt" in ways:
        preemptor, why_not = _preemptor(run, job)
    if why_not is not None:
        ways = [way for way in ways if way != "preempt"]
        done.append(Done("preemption (another QOS)", 0, refused=why_not, way="preempt"))
    plan = disturbances(job, ways, preemptor, only_ways=only_ways)
    for number, each in enumerate(plan, start=1):
        _wait_step(run, number * steps // (len(plan) + 2))
        if not run.attempts:
            raise R1hpcError(f"no attempt of {run.run_id} began: see python -m r1hpc.status {run.path}")
        last, refused = run.attempts[-1].attempt, None
        try:
            each.apply(_job(run))
        except SlurmError as error:
            refused = without_advice(error)
        except ProcessLookupError:
            refused = "the run was over before: give more --steps"
        done.append(Done(each.name, last, each.causes, each.may_lose_steps, refused, each.way))
        if refused is None:
            _wait_step(run, 0, last + 1)
    return done


def _preemptor(run: Run, job: JobRef) -> tuple[tuple[str, ...], str | None]:
    """Return the sbatch options of a job that preempts the run's, and why there is none."""
    from r1hpc.config.load import read
    from r1hpc.preflight.disturb import why_not_preempted
    from r1hpc.slurm.defaults import place_in_cluster
    from r1hpc.slurm.probe import probe_cluster

    if job.pid is not None:
        return (), "there is no Slurm here to preempt it"
    config = read(run.folder.config)
    partition, qos, account = place_in_cluster(config)
    facts = probe_cluster(partition, qos, account)
    why_not = why_not_preempted(facts)
    if why_not is not None:
        return (), why_not
    asked = {
        "qos": next(name for name, victim in facts.preemptors if victim == facts.qos),
        "partition": partition,
        "account": account,
        "gpus-per-node": config.resources.gpus_per_node or None,
    }
    return tuple(f"--{name}={value}" for name, value in asked.items() if value is not None), None


def _limit(
    arguments: Any, name: str, shortened: Sequence[str], quiet: Run
) -> tuple[Run | None, Done, list[Check]]:
    """Submit the job with a time limit that ends its attempts; the run, if any, and its verdict."""
    from r1hpc.preflight.disturb import Done, judge_limited, short_limit_min

    def refused(why: str) -> tuple[None, Done, list[Check]]:
        return None, Done("time limit", 0, refused=why, way="limit"), []

    if _job(quiet).pid is not None:
        return refused("a run on this machine has no time limit")
    attempt, times = quiet.attempts[-1], [step.time or 0.0 for step in quiet.metrics()]
    total_s = (attempt.end or times[-1]) - attempt.start
    minutes = short_limit_min(total_s, times[0] - attempt.start, (times[-1] - times[0]) / len(times))
    if minutes is None:
        why = f"the undisturbed run took {total_s:.0f} s, and a limit of Slurm is whole minutes"
        return refused(f"{why}: give more --steps")
    run = _submit(arguments, name, shortened, f"resources.time={minutes}", "resources.signal_lead_s=null")
    _wait_over(run)
    if len(run.attempts) == 1 and run.state().value == "finished":
        return run, refused(f"the run finished within its limit of {minutes} min: give more --steps")[1], []
    limit = f"time limit of {minutes} min"
    checks = judge_limited(quiet.folder, run.folder, run.attempts, limit)
    return run, Done(limit, 1, way="limit"), checks


def _preempt_and_cancel(run: Run) -> None:
    """Preempt and cancel at once, so that the cancel meets an attempt that is about to come back."""
    from r1hpc.preflight.disturb import preempt
    from r1hpc.slurm.client import SlurmError

    _wait_step(run, 3)
    try:
        preempt(_job(run))
        run.cancel()
    except (ProcessLookupError, SlurmError, StateError):
        if not run.state().is_over:  # else it was faster; the verdict says so
            raise
    _wait_over(run)
    time.sleep(_AFTER_CANCEL_S)


def _job(run: Run) -> Any:
    job = run.situation().job
    if job is None:
        raise R1hpcError(f"{run.run_id} names no job: nothing can be done to it")
    return job


def _wait_step(run: Run, step: int, attempt: int = 0) -> None:
    """Wait until that attempt, or a later one, has taken that step, or a later one."""
    from r1hpc.telemetry.records.metrics import last_steps

    def is_there() -> bool:
        return any(each.global_step >= step and each.attempt >= attempt for each in last_steps(run.folder, 1))

    _wait(run, is_there)


def _wait_over(run: Run) -> str:
    """Wait until the run is over and the end of its last attempt is recorded; return its state."""
    _wait(run, lambda: False)
    return run.wait(_PATIENCE_S).value


def _wait(run: Run, reached: Callable[[], bool]) -> None:
    """Wait until `reached`, or until the run is over: the verdict then shows the result.

    Raise R1hpcError if neither happened within an hour, not counting its time in the queue.
    """
    deadline, asked = time.monotonic() + _PATIENCE_S, time.monotonic()
    while not reached():
        if time.monotonic() - asked > _ASK_EVERY_S:
            state, asked = run.state(), time.monotonic()
            if state.is_over:
                return
            if state.value in ("queued", "requeued"):
                deadline = asked + _PATIENCE_S
            elif asked > deadline:
                raise R1hpcError(
                    f"{run.run_id} has run for an hour, longer than a drill waits, and its job continues: "
                    f"python -m r1hpc.status {run.path} shows it, python -m r1hpc.cancel {run.path} ends it"
                )
        time.sleep(0.1)


def as_text(value: dict[str, Any]) -> str:
    """Return one page of Markdown."""
    verdict = "passed: nothing was lost" if value["passed"] else "FAILED"
    rows = [
        f"| {'yes' if c['passed'] else '**NO**'} | {c['check']} | {c['detail']} |" for c in value["checks"]
    ]
    ways = [
        f"- {each['way']}: " + ("exercised" if each["exercised"] else f"not exercised: {each['why']}")
        for each in value["ways"]
    ]
    skipped = [f"- not done: {each['what']}: {each['why']}" for each in value["not_done"]]
    skipped += [""] if skipped else []
    runs = [f"- `{path}`" for path in value["runs"]]
    head = [f"# Drill of {value['job']}: {verdict}", "", "| kept | promise | seen |", "|---|---|---|"]
    return "\n".join([*head, *rows, "", "Ways to be preempted:", *ways, "", *skipped, "The runs:", *runs])


if __name__ == "__main__":
    run_command(main)
