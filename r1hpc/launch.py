"""Run the parts of a job: `begin` and `end` on the batch host, `rank` on every GPU, `local` without Slurm.

    python -m r1hpc.launch begin RUN_DIR                      # prints the attempt's number; none if over
    srun … python -m r1hpc.launch rank RUN_DIR                # R1HPC_ATTEMPT=<number>
    python -m r1hpc.launch end RUN_DIR --attempt K --status S # records the cause, requeues when needed
    python -m r1hpc.launch local RUN_DIR                      # all parts here, until the run is over
    python -m r1hpc.launch track RUN_DIR --attempt K          # feeds W&B and other trackers; begin starts it
    python -m r1hpc.launch chain CHAIN_DIR --stages RUN_DIR … # one after the other, here

The job script (job.sh in the run folder) calls it; call it by hand only to debug.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir, find_run, open_run


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.launch", description=__doc__)
    parser.add_argument("step", choices=("begin", "rank", "end", "local", "track", "chain"))
    parser.add_argument("run_dir")
    parser.add_argument("--attempt", type=int, help="end, track: the number that begin printed")
    parser.add_argument("--tracker", help="track: feed this one, until stdin ends")
    parser.add_argument("--status", type=int, default=0, help="end: srun's exit status")
    parser.add_argument("--hurry", action="store_true", help="end: no diagnosis; KILL is near")
    parser.add_argument("--payload", action="store_true", help="begin: submitit will start the ranks")
    parser.add_argument("--stages", nargs="+", default=[], metavar="RUN_DIR", help="chain: what to run")
    parser.add_argument("--at-most", type=int, default=1, help="chain: how many run at a time")
    parser.add_argument("--lock-fd", type=int, help="chain: the lock, inherited from the submission")
    arguments = parser.parse_args(argv)
    os.umask(0o077)
    if arguments.step == "chain":
        return _chain(arguments.run_dir, arguments.stages, arguments.lock_fd, arguments.at_most)
    if arguments.step == "begin":
        return _begin(find_run(arguments.run_dir), arguments.payload)
    if arguments.step in ("end", "track") and arguments.attempt is None:
        parser.error(f"{arguments.step} needs --attempt")
    if arguments.step == "end":  # the attempt's end is recorded whatever became of the folder
        return _end(find_run(arguments.run_dir), arguments.attempt, arguments.status, arguments.hurry)
    run = open_run(arguments.run_dir)
    if arguments.step == "track":
        return _track(run, arguments.attempt, arguments.tracker)
    if arguments.step == "rank":
        run_rank(str(run.path))
    from r1hpc.attempt.local import Supervisor

    return Supervisor(run).supervise()


def run_rank(run_dir: str) -> NoReturn:
    """Run one rank. submitit pickles this function by this name; every way of starting ends here."""
    from r1hpc.attempt.control.stop import SIGNALS

    # Kept until StopRequests.install: submitit's own handlers drop a SIGTERM and fail at a SIGUSR2.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    from r1hpc.attempt.rank import run_rank as attempt_rank

    os.umask(0o077)
    attempt_rank(run_dir)


def _chain(chain_dir: str, stages: Sequence[str], lock_fd: int | None, at_most: int) -> int:
    from r1hpc.submission.chain.folder import SUPERVISOR, ChainDir, held
    from r1hpc.submission.chain.supervisor import ChainSupervisor

    chain, runs = ChainDir(chain_dir), [open_run(stage) for stage in stages]
    if lock_fd is not None:
        return ChainSupervisor(chain, runs, lock_fd, at_most).supervise()
    with held(chain, SUPERVISOR) as lock:
        return ChainSupervisor(chain, runs, lock, at_most).supervise()


def _track(run: RunDir, attempt: int, tracker: str | None) -> int:
    if tracker is None:
        from r1hpc.attempt.trackers import track

        track(run, attempt)
    else:
        from r1hpc.config.load import read
        from r1hpc.telemetry.trackers.feeder import feed

        feed(run, read(run.config), attempt, tracker)
    return 0


def _begin(run: RunDir, by_submitit: bool) -> int:
    """Return 0 if an attempt begins or none has to, OVER if none begins and dependent jobs must not start, or
    NOT_THE_NODE if another node cannot help either."""
    from r1hpc.attempt.begin import begin, is_stage
    from r1hpc.attempt.may_begin import NotTheNodeError
    from r1hpc.slurm.rank_env import expand_counts, expand_nodelist, job_id
    from r1hpc.slurm.shell.contract import OVER

    if not {"SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"} <= os.environ.keys():
        raise UsageError("begin belongs inside a job: start it with srun or salloc, or take `local`")
    names = expand_nodelist(os.environ["SLURM_JOB_NODELIST"])
    ranks = sum(expand_counts(os.environ["SLURM_TASKS_PER_NODE"]))
    try:
        attempt = begin(run, "slurm", job_id(os.environ) or "", names, ranks, by_submitit=by_submitit)
    except NotTheNodeError as error:
        with suppress(OSError):  # a full disk
            print(" ".join(str(error).split()))  # for the comment of the job that is held
        raise
    if attempt is not None:
        print(attempt)
        # In the batch log it keeps the lines of srun apart, by which attempts are judged.
        where = os.environ["SLURM_JOB_NODELIST"]
        print(f"{run.run_id}: attempt {attempt} begins on {where}", file=sys.stderr)
    elif is_stage(run) and not run.finished.exists():
        return OVER
    return 0


def _end(run: RunDir, attempt: int, status: int, hurry: bool) -> int:
    """Return 0 if the job is done or goes on, OVER if its end is recorded, anything else if undecided."""
    from r1hpc.attempt.end import OverError
    from r1hpc.slurm.shell.contract import NOT_THE_NODE, OVER
    from r1hpc.submission.chain.next_job import end_and_go_on
    from r1hpc.telemetry.records.attempts import read_run_events

    begun = [event["attempt"] for event in read_run_events(run)[0] if event["event"] == "begin"]
    if attempt not in begun:
        raise UsageError(f"{run.run_id} has begun no attempt {attempt}: give the number begin printed")
    try:
        left = end_and_go_on(run, attempt, status, diagnose=not hurry)
        return left if left in (0, NOT_THE_NODE) else OVER
    except OverError as error:
        print(f"error: {error}", file=sys.stderr)
        return OVER


if __name__ == "__main__":
    run_command(main)
