"""End a run.

    python -m r1hpc.cancel RUN_DIR               # its job gets SIGTERM; it is not requeued
    python -m r1hpc.cancel RUN_DIR --save-first  # touch STOP: it saves at a step edge, then leaves
    python -m r1hpc.cancel CHAIN                 # every stage that waits or runs, the last first

A job is cancelled by its id alone, from the run folder, after a look at whether it is yours and
this run's: `scancel --name` would hit other runs, and a job id can be another job's on another
cluster.
"""

import os
import re
import signal
import socket
from collections.abc import Sequence
from typing import Any

from r1hpc.attempt.state import JobRef, Situation, State, is_supervisor, look
from r1hpc.base.choose_run import add_run_root, choose_run
from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import StateError
from r1hpc.base.names import printable
from r1hpc.base.rundir import RunDir
from r1hpc.slurm.client import call
from r1hpc.submission.chain_folder import ChainDir, choose_chain
from r1hpc.submission.chain_state import StageSituation, look_at
from r1hpc.telemetry.attempts import record


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    chain = choose_chain(arguments.run_dir, arguments.run_root)
    if chain is not None:
        return _cancel_chain(chain, arguments)
    run = choose_run(arguments.run_dir, arguments.run_root)
    situation = look(run)
    if situation.state.is_over:
        action, said = "none", f"{run.run_id} is {situation.state.value} already: nothing to cancel"
    elif arguments.save_first:
        action, said = "stop", save_first(run, situation)
    else:
        action, said = cancel(run, situation)
    if arguments.json:
        job_id = situation.job.job_id if situation.job else None
        print_json(
            {"run_id": run.run_id, "run_dir": str(run.path), "job_id": job_id, "action": action, "said": said}
        )
    else:
        print(said)
    return 0


def _cancel_chain(chain: ChainDir, arguments: Any) -> int:
    """The last stage first: none may begin because the one before it has just left."""
    open_stages = [stage for stage in look_at(chain).stages if stage.is_at_work]
    done = [_cancel_stage(stage, arguments.save_first) for stage in reversed(open_stages)]
    if arguments.json:
        print_json({"chain": chain.name, "chain_dir": str(chain.path), "stages": done})
    else:
        print("\n".join(each["said"] for each in done) or f"{chain.name}: no stage waits or runs")
    return 0


def _cancel_stage(stage: StageSituation, softly: bool) -> dict[str, Any]:
    run, situation = stage.run, stage.situation
    assert situation is not None, "it is at work"
    if softly or _is_queued_here(situation):
        # The supervisor of a chain has one process for all stages that wait: STOP is for this one alone.
        action, said = "stop", save_first(run, situation)
    else:
        action, said = cancel(run, situation)
    return {"stage": stage.name, "run_dir": str(run.path), "action": action, "said": said}


def _is_queued_here(situation: Situation) -> bool:
    job = situation.job
    return situation.state is State.queued and job is not None and job.pid is not None


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.cancel", description=__doc__)
    parser.add_argument(
        "run_dir", nargs="?", metavar="RUN_DIR", help="a run or a chain: its folder or its name"
    )
    parser.add_argument("--save-first", action="store_true", help="let it save and leave by itself")
    add_run_root(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def save_first(run: RunDir, situation: Situation) -> str:
    """Touch STOP; says what follows from it."""
    run.stop.touch(mode=0o600)
    if situation.state is State.running:
        return f"{run.run_id} saves at its next step edge and leaves for good (STOP is touched)"
    return (
        f"{run.run_id} is {situation.state.value}: its next attempt will find STOP and leave at once; "
        "without --save-first the job itself is cancelled"
    )


def cancel(run: RunDir, situation: Situation) -> tuple[str, str]:
    """End the newest job of the run: (what was done, what to tell).

    Raises:
        StateError: there is no job, or it is not this run's, or not yours, or on another host.
        SlurmError: Slurm did not answer.
    """
    job = situation.job
    if job is None:
        raise StateError(f"{run.path} names no job: it was never submitted")
    if job.pid is not None:
        return "sigterm", _cancel_local(run, job, job.pid)
    if not job.is_slurm:
        raise StateError(
            f"{run.attempts} names a job {printable(job.job_id)!r} that is neither Slurm's nor local"
        )
    check_is_ours(run, job, call(["scontrol", "show", "job", "-o", job.job_id], 10.0))
    # A pending job leaves no attempt; of a running one Slurm's own CANCELLED is the better witness.
    call(["scancel", job.job_id], 20.0)
    _record(run)
    return "scancel", (
        f"job {job.job_id} is cancelled; a running attempt gets SIGTERM and, as long as KillWait lasts, "
        "saves. It is not requeued."
    )


def check_is_ours(run: RunDir, job: JobRef, shown: str) -> None:
    """Refuse a job of another user or of another run, by what `scontrol show job -o` says.

    It is this run's when it names the run folder or the run (its script, its comment, its log), or when its
    id is part of the run's name, as sbatch/train.sh makes it.
    """
    owner = re.search(r" UserId=[^ ]*?\((\d+)\)", shown)
    if owner is None or int(owner[1]) != os.getuid():
        raise StateError(
            f"job {job.job_id} is not yours, so not {run.run_id}'s: was the run made on another cluster?"
        )
    names_run = str(run.path) in shown or re.search(rf"[=/ ]{re.escape(run.run_id)}(?![\w.-])", shown)
    if not names_run and not run.run_id.endswith(f"-{job.job_id}"):
        raise StateError(
            f"job {job.job_id} does not name {run.run_id} anywhere, so it may be another run's. "
            f"Look at `scontrol show job {job.job_id}`; if it is this run's: scancel {job.job_id}"
        )


def _cancel_local(run: RunDir, job: JobRef, pid: int) -> str:
    if job.host not in (None, socket.gethostname()):
        raise StateError(f"{run.run_id} runs on {job.host}: cancel it there, or touch {run.stop}")
    if not is_supervisor(pid, run.path):
        raise StateError(f"process {pid} is gone or not {run.run_id}'s: nothing was cancelled")
    _record(run)
    # The supervisor passes it on to its ranks, which save and leave. Where it leads its own process group,
    # what it has started besides (the building of a dataset) gets it too.
    if os.getpgid(pid) == pid:
        os.killpg(pid, signal.SIGTERM)
    else:
        os.kill(pid, signal.SIGTERM)
    return f"process {pid} got SIGTERM: {run.run_id} saves and leaves for good"


def _record(run: RunDir) -> None:
    """So that the attempt's cause becomes cancelled, and not preempted."""
    record(run, "cancel_requested", by=os.environ.get("USER", str(os.getuid())))


if __name__ == "__main__":
    run_command(main)
