"""Run one rank of an attempt: hand it to its workload, and record how it ended.

Every way of starting calls `run_rank(run_dir)`: submitit's pickle, `srun python -m r1hpc.launch rank`, the
local supervisor. torch is imported only after the signal handlers are set; earlier signals are kept
(launch.run_rank).
"""

import errno
import os
import sys
import time
import traceback
from functools import partial
from typing import NoReturn

from r1hpc.attempt.begin import read_facts
from r1hpc.attempt.control.stop import Deadlines, StopRequests
from r1hpc.attempt.control.watchdog import Watchdog
from r1hpc.attempt.limits import seconds_left
from r1hpc.attempt.state.cause import FAILED, FINISHED, HANG, LEFT_ALONE, STOPPED, RankOutcome, write_outcome
from r1hpc.attempt.workload import LeftAloneError, RankJob, workload_of
from r1hpc.base.errors import FinalError, R1hpcError, StateError, UsageError
from r1hpc.base.files import check_owned, read_json
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.checkpoint.finished import write_finished
from r1hpc.config.load import read
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.rank_env import RankContext, current
from r1hpc.telemetry.gpu.sampler import GpuSampler
from r1hpc.telemetry.records.attempts import Cause, read_history
from r1hpc.telemetry.records.lines import PlanFacts

_FILE_SYSTEM_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run_rank(run_dir: str) -> NoReturn:
    """Run this process's rank of the attempt in $R1HPC_ATTEMPT.

    Exits the process itself. If the function returned, submitit would write a result that nobody reads and
    fail over a half-written one of an earlier kill. Leftover threads of torch and DeepSpeed can also abort an
    interpreter that unwinds.
    """
    run = open_run(run_dir)
    context = current(os.environ)
    check_owned(run.config)
    config = read(run.config)
    requests = StopRequests(run, context.rank, _deadlines(run, config, context))
    requests.install()

    def leave(kind: str, detail: str) -> None:
        _leave_outcome(run, context, RankOutcome(context.rank, kind, context.node_name, detail=detail))

    watchdog = Watchdog(config.train.hang_timeout_s, partial(leave, HANG), partial(leave, LEFT_ALONE))
    sampler = None
    try:
        watchdog.start()  # starts a process, which fails if the node has reached its process limit
        sampler = _start_sampler(run, config, context)
        facts = read_facts(run, context.attempt)
        job = RankJob(config, run, context, facts.token, facts.dataset_path, requests, watchdog)
        done = workload_of(config.stage).run(job)
    except BaseException as error:
        failure = _failure(context, error)
        _leave_outcome(run, context, failure)
        if isinstance(error, R1hpcError):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in _FILE_SYSTEM_REFUSES:
            print(f"error: {error.strerror}: {error.filename or run.path}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        watchdog.fail(f"rank {context.rank} on {context.node_name} failed: {failure.detail}")
        # Do not unwind: destructors of a broken process group can wait for dead peers.
        os._exit(1)
    finally:
        if sampler is not None:
            sampler.stop()
    watchdog.stop()
    kind = FINISHED if done.finished else STOPPED
    node, step = context.node_name, done.global_step
    _report(run, context, RankOutcome(context.rank, kind, node, step, done.reason, kept=done.kept))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _deadlines(run: RunDir, config: RunConfig, context: RankContext) -> Deadlines:
    """Return when to save first, when the run's GPU-hours and the job's time end, and the warning time."""
    if context.rank != 0:
        return Deadlines()
    now, end = time.monotonic(), read_facts(run, context.attempt).ends_at
    most = config.limits.max_gpu_hours
    left = None if most is None else seconds_left(read_history(run), most, time.time())
    warning = read_json(run.plan, PlanFacts).get("warning_window_s") if run.plan.exists() else None
    return Deadlines(
        first_save_at=None if end is None else (now + max(now, end)) / 2,
        stop_at=None if left is None else now + left,
        ends_at=end,
        warning_window_s=warning,
    )


def _start_sampler(run: RunDir, config: RunConfig, context: RankContext) -> GpuSampler | None:
    """Start one NVML sampler per node, on its first rank; none if the run has no GPUs of its own."""
    if not (config.monitor.enabled and config.resources.gpus_per_node) or context.local_rank != 0:
        return None
    sampler = GpuSampler(
        run.gpu_metrics(context.node_name), context.node_name, context.attempt, config.monitor.period_s
    )
    sampler.start()
    return sampler


def _report(run: RunDir, context: RankContext, left: RankOutcome) -> None:
    is_finished = left.kind == FINISHED
    if context.rank == 0 and is_finished:  # first: if it is killed in between, FINISHED is enough
        try:
            write_finished(run, left.global_step)
        except (OSError, StateError) as error:  # the outcome records it too
            print(f"could not write {run.finished}: {error}", file=sys.stderr)
    _leave_outcome(run, context, left)
    if context.rank != 0:
        return
    what = "finished" if is_finished else f"stopped by {left.reason or 'another rank'}"
    when = f" after step {left.global_step}" if left.global_step is not None else ""
    print(f"{what}{when}", flush=True)


def _leave_outcome(run: RunDir, context: RankContext, outcome: RankOutcome) -> None:
    try:
        write_outcome(run, context.attempt, outcome)
    except OSError as error:  # a full disk must not hide why the rank failed
        print(f"could not write the outcome of rank {context.rank}: {error}", file=sys.stderr)


def informative(text: str) -> str:
    """Return an exception's first line; one that ends in a colon, as pydantic's, with the next line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[0] if lines else ""
    for line in lines[1:]:
        if not shown.endswith(":"):
            break
        shown = f"{shown} {line}"
    return shown


def _failure(context: RankContext, error: BaseException) -> RankOutcome:
    first = informative(str(error))
    if isinstance(error, LeftAloneError):
        return RankOutcome(context.rank, LEFT_ALONE, context.node_name, detail=first)
    cause = Cause.crash
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        cause = Cause.oom
    # Configuration errors are permanent. A full disk, a slow node or a bad read may pass: those are crashes.
    elif isinstance(error, (UsageError, FinalError)):
        cause = Cause.refused
    detail = f"{type(error).__name__}: {first}"[:500]
    return RankOutcome(context.rank, FAILED, context.node_name, cause=cause.value, detail=detail)
