"""Start a run, or a chain of them: on Slurm, or on this machine where there is none.

    python -m r1hpc.submit --nodes 4                   # jobs/train.yaml
    python -m r1hpc.submit jobs/smoke.yaml train.num_steps=20 --follow
    python -m r1hpc.submit --nodes 4 --dry-run         # the plan and the script, no Slurm needed
    python -m r1hpc.submit --run-name NAME --resume    # go on with a run, perhaps on other nodes

    python -m r1hpc.submit jobs/r1.yaml                # a chain: each stage a job, tied by dependencies
    python -m r1hpc.submit jobs/r1.yaml                # again: goes on where it stopped
    python -m r1hpc.submit jobs/r1.yaml --run-name NAME grpo:train.lr=3e-5 train.seed=1

KEY=VALUE and flags reach every stage of a chain, STAGE:KEY=VALUE reaches one. What is
finished is not done twice. A chain is called after its file unless --run-name says otherwise.

Everything is checked, then frozen into the run folder, then submitted: exit status 0 means
submitted (with --follow: finished).
"""

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.names import check_name, nearest, printable
from r1hpc.base.rundir import default_run_root
from r1hpc.slurm import flags

# What is needed only once something is asked for is imported where it is used: --help must be quick.
if TYPE_CHECKING:
    from typing import TextIO

    from r1hpc.submission.chain_folder import ChainDir
    from r1hpc.submission.submit_run import Order
    from r1hpc.submission.text import Prepared

_DEFAULT_JOB = "train"


@dataclass(frozen=True)
class _Request:
    """A command line, read."""

    arguments: argparse.Namespace
    job: str | None
    order: "Order"


def main(argv: Sequence[str]) -> int:
    """Parse, check, freeze, submit, and follow when asked to."""
    request = _read(argv)
    os.umask(0o077)
    if request.arguments.prepare_only:
        return _prepare_inside_job(request)
    chain = _chain(request)
    return _submit_run(request) if chain is None else _submit_chain(request, chain)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.submit", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="JOB.yaml | KEY=VALUE", help="job file, dotted overrides")
    parser.add_argument("--executor", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the script; write nothing")
    parser.add_argument("--follow", action="store_true", help="print progress until the run is over")
    parser.add_argument("--run-root", metavar="DIR", help="where runs lie; default $R1HPC_RUN_ROOT or ./runs")
    parser.add_argument("--run-name", metavar="NAME", help="default JOB-DATE-TIME-XXXX")
    parser.add_argument("--resume", action="store_true", help="go on with the run called --run-name")
    parser.add_argument(
        "--cluster", metavar="NAME", help="profile in configs/cluster/; default $R1HPC_CLUSTER"
    )
    parser.add_argument("--over-budget", metavar="REASON", help="go over the budget, and say why")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--prepare-only", action="store_true", help=argparse.SUPPRESS)  # sbatch/train.sh
    flags.add_flags(parser)
    return parser


def _read(argv: Sequence[str]) -> _Request:
    from r1hpc.slurm.fields import refuse_shell_overrides
    from r1hpc.submission.chain_file import without_stage
    from r1hpc.submission.submit_run import Order, Purpose

    parser = _parser()
    # Intermixed: job files, overrides and flags come in any order, as people type them.
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        parser.error(f"unknown argument {printable(unknown[0])!r}{nearest(unknown[0].split('=')[0], known)}")
    jobs = [word for word in arguments.words if "=" not in word]
    if len(jobs) > 1:
        raise UsageError(f"two job files, {printable(jobs[0])} and {printable(jobs[1])}: a run has one")
    given = [word for word in arguments.words if "=" in word]
    refuse_shell_overrides([without_stage(item) for item in given])
    overrides = [
        *flags.overrides_from_environment(os.environ),
        *given,
        *flags.overrides_from_flags(arguments),
    ]
    if arguments.dry_run:
        purpose = Purpose.dry_run
    else:
        purpose = Purpose.inside_job if arguments.prepare_only else Purpose.start
    order = Order(
        purpose,
        arguments.executor,
        tuple(argv),
        tuple(overrides),
        arguments.cluster,
        Path(arguments.run_root) if arguments.run_root else default_run_root(),
        arguments.over_budget,
    )
    return _Request(arguments, jobs[0] if jobs else None, order)


def _submit_run(request: _Request) -> int:
    from r1hpc.submission import submit_run as submission
    from r1hpc.submission.text import announce

    arguments = request.arguments
    prepared = _within_budget(_resume(request) if arguments.resume else _fresh(request), request.order)
    if arguments.dry_run:
        announce(prepared, None, arguments.json, dry_run=True)
        return 0
    job_id = submission.submit(prepared, request.order)
    announce(prepared, job_id, arguments.json)
    if arguments.follow:
        from r1hpc.attempt.follow import follow

        return follow(prepared.run, job_id, _progress(arguments))
    return 0


def _fresh(request: _Request) -> "Prepared":
    """A run that does not exist yet."""
    from r1hpc.config import load
    from r1hpc.submission import submit_run as submission

    arguments = request.arguments
    job = request.job or _DEFAULT_JOB
    config = load.load(job, request.order.overrides, arguments.cluster)
    run = submission.place(arguments.run_root, arguments.run_name or _new_name(job))
    return submission.fresh(run, config, request.order)


def _resume(request: _Request) -> "Prepared":
    """A run that exists: its frozen code and configuration, with other resources or more steps."""
    from r1hpc.submission import submit_run as submission

    arguments = request.arguments
    if not arguments.run_name:
        raise UsageError("--resume goes with --run-name NAME: which run?")
    if request.job:
        raise UsageError(f"--resume takes the job file frozen in the run: leave {printable(request.job)} out")
    return submission.resumed(submission.place(arguments.run_root, arguments.run_name), request.order)


def _within_budget(prepared: "Prepared", order: "Order") -> "Prepared":
    """The run with what the budget says to it; an error where it does not fit."""
    from r1hpc.submission.cost import check_budget

    said = check_budget([prepared], order.run_root, order.over_budget)
    return dataclasses.replace(prepared, notes=(*prepared.notes, *said))


def _new_name(job: str) -> str:
    import secrets

    return f"{Path(job).stem[:38]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _chain(request: _Request) -> "ChainDir | None":
    """The chain that is asked for, by its file or by its name; None where it is a run."""
    from r1hpc.config.load import find_job
    from r1hpc.submission.chain_file import is_chain_file
    from r1hpc.submission.chain_folder import ChainDir, find_chain
    from r1hpc.submission.submit_run import place

    arguments = request.arguments
    if request.job is not None and is_chain_file(find_job(request.job)):
        name = check_name(arguments.run_name or find_job(request.job).stem, "--run-name")
    elif request.job is None and arguments.run_name:
        name = arguments.run_name
    else:
        return None
    chain = ChainDir(place(arguments.run_root, name).path)
    return find_chain(chain.path) or (chain if request.job is not None else None)


def _submit_chain(request: _Request, chain: "ChainDir") -> int:
    from r1hpc.config.load import find_job
    from r1hpc.submission.chain_command import submit_chain
    from r1hpc.submission.chain_state import follow_chain
    from r1hpc.submission.chain_text import announce_chain

    arguments = request.arguments
    source = find_job(request.job) if request.job is not None else None
    done = submit_chain(chain, source, request.order)
    announce_chain(done, arguments.json, arguments.dry_run)
    if arguments.follow and not arguments.dry_run:
        return follow_chain(chain, done.jobs, _progress(arguments))
    return 0


def _progress(arguments: argparse.Namespace) -> "TextIO":
    """Where --follow prints: stdout is the JSON object's."""
    return sys.stderr if arguments.json else sys.stdout


def _prepare_inside_job(request: _Request) -> int:
    """For sbatch/train.sh: make this job's run folder, or find it again; print its ranks and path."""
    from r1hpc.base.files import write_atomic
    from r1hpc.config import load
    from r1hpc.slurm import decide, env, script
    from r1hpc.submission import submit_run as submission
    from r1hpc.telemetry.attempts import read_history

    job_id, arguments = env.job_id(os.environ), request.arguments
    if job_id is None:
        raise UsageError("--prepare-only belongs to sbatch/train.sh and runs inside a job")
    run = submission.place(arguments.run_root, arguments.run_name)
    if run.config.is_file() and any(s.get("job_id") == job_id for s in read_history(run).submissions):
        config = load.read(run.config)  # a requeued job: nothing is decided again
        print(script.ranks_per_node(config, config.resources.gpus_per_node or 0), run.path)
        return 0
    source = run.config if arguments.resume else request.job or _DEFAULT_JOB
    asked = load.load(source, request.order.overrides, arguments.cluster)
    actual = decide.overrides_of_allocation(os.environ, is_cpu_run=asked.resources.gpus_per_node == 0)
    overrides = (*request.order.overrides, *actual)
    order = dataclasses.replace(request.order, executor="slurm", overrides=overrides)
    request = dataclasses.replace(request, order=order)
    if submission.is_half_made(run):
        shutil.rmtree(run.path)  # this job was preempted while it made it
    prepared = _within_budget(_resume(request) if arguments.resume else _fresh(request), order)
    direct = dataclasses.replace(prepared.script, by_submitit=False)
    prepared = dataclasses.replace(prepared, script=direct)
    if prepared.is_new:
        submission.create(run)
    try:
        submission.write(prepared, order)
        write_atomic(run.path / "site.sh", script.site_lines(direct.setup, direct.environment))
    except (R1hpcError, OSError):
        if prepared.is_new:
            shutil.rmtree(run.path)
        raise
    submission.remove_switches(run)
    submission.record_submission(prepared, order, job_id, time.time())
    for note in prepared.notes:
        print(note, file=sys.stderr)
    print(direct.ranks_per_node, run.path)
    return 0


if __name__ == "__main__":
    run_command(main)
