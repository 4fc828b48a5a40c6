"""Start a run or a chain of runs, on Slurm or, without one, on this machine.

    python -m r1hpc.submit --nodes 4                   # jobs/train.yaml
    python -m r1hpc.submit jobs/smoke.yaml train.num_steps=20 --follow
    python -m r1hpc.submit --nodes 4 --dry-run         # script, plan, and Slurm's answer if there is one
    python -m r1hpc.submit --run-name NAME --resume    # continue a run, perhaps on other nodes

    python -m r1hpc.submit train.py -N 2 -- --lr 1e-4  # a training script of your own, and its arguments

    python -m r1hpc.submit jobs/r1.yaml                # a chain: each stage a job, tied by dependencies
    python -m r1hpc.submit jobs/r1.yaml                # again: continues where it stopped
    python -m r1hpc.submit jobs/r1.yaml --run-name NAME grpo:train.lr=3e-5 train.seed=1

KEY=VALUE and flags apply to every stage of a chain, STAGE:KEY=VALUE to one. Finished stages are skipped. A
chain has the name of its file unless --run-name gives another.

Everything is checked, then frozen into the run folder, then submitted. Exit status 0: submitted (with
--follow: finished).
"""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from r1hpc.base.choose_run import RUN_NAMES
from r1hpc.base.cli import ArgumentParser, add_job_words, file_and_overrides, offer, run_command
from r1hpc.base.run_dir import run_root_of


def main(argv: Sequence[str]) -> int:
    """Parse, submit, print, and follow when asked to."""
    from r1hpc.slurm.flags import all_overrides, submission_options

    arguments, of_script = _parser().parse_command(argv, "r1hpc.script.launcher")
    os.umask(0o077)
    job, given = file_and_overrides(arguments.words)
    overrides = [*all_overrides(given, arguments), *of_script]
    if arguments.prepare_only:
        return _prepare_inside_job(job, overrides, arguments, argv)
    gc.disable()  # modules load until the job is submitted: there is little to collect
    try:
        from r1hpc import api  # deferred to keep --help quick

        done = api.submit(
            job,
            overrides=overrides,
            resume=arguments.resume,
            from_stage=arguments.from_stage,
            reuse=arguments.reuse,
            redo=arguments.redo,
            argv=argv,
            **submission_options(arguments),
        )
    finally:
        gc.enable()
    done.print(as_json=arguments.json)
    if arguments.follow and not arguments.dry_run:
        return done.follow(sys.stderr if arguments.json else sys.stdout)  # stdout is for the JSON object
    return 0


def _parser() -> ArgumentParser:
    from r1hpc.slurm.flags import add_submission_flags

    parser = ArgumentParser(prog="python -m r1hpc.submit", description=__doc__)
    add_job_words(parser, "JOB.yaml | SCRIPT.py | KEY=VALUE", "job file or script, dotted overrides")
    parser.add_argument("--follow", action="store_true", help="print progress until the run is over")
    name = parser.add_argument("--run-name", metavar="NAME", help="default JOB-DATE-TIME-XXXX")
    offer(name, RUN_NAMES)
    parser.add_argument("--resume", action="store_true", help="go on with the run called --run-name")
    parser.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help="a new chain from this stage on; those before it are the chain's of this file, or CHAIN:STAGE",
    )
    parser.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="CHAIN:STAGE",
        help="a new chain takes this finished stage from another one; may be repeated",
    )
    parser.add_argument(
        "--redo", action="store_true", help="run a chain's old stages again, whose input has changed"
    )
    parser.add_argument("--prepare-only", action="store_true", help=argparse.SUPPRESS)  # sbatch/train.sh
    add_submission_flags(parser)
    return parser


def _prepare_inside_job(
    job: str | None, overrides: Sequence[str], arguments: argparse.Namespace, argv: Sequence[str]
) -> int:
    """For sbatch/train.sh: print this job's ranks per node and the path of its run folder.

    The statuses of MustNotGoOnError and NotTheNodeError tell the script that the node is not at fault.
    """
    from r1hpc.attempt.may_begin import MustNotGoOnError, is_final, refuse_a_full_disk
    from r1hpc.base.errors import R1hpcError
    from r1hpc.submission.order import Order, Purpose
    from r1hpc.submission.submit import prepare_inside_job

    order = Order(
        Purpose.inside_job,
        argv=tuple(argv),
        overrides=tuple(overrides),
        cluster=arguments.cluster,
        run_root=run_root_of(arguments.run_root),
        over_budget=arguments.over_budget,
        job=job,
        run_name=arguments.run_name,
        resume=arguments.resume,
    )
    try:
        ranks, run, notes = prepare_inside_job(order)
    except (R1hpcError, OSError) as error:
        refuse_a_full_disk(error, order.run_root / str(order.run_name))
        if isinstance(error, R1hpcError) and error.exit_status == 1 and is_final(error):
            raise MustNotGoOnError(str(error)) from error
        raise
    for note in notes:
        print(note, file=sys.stderr)
    print(ranks, run.path)
    return 0


class _CallableModule(ModuleType):
    """Make `from r1hpc import submit` this module however it was imported; a call is r1hpc.api.submit."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from r1hpc import api

        return api.submit(*args, **options)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    run_command(main)
