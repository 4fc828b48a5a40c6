"""Estimate the GPU-hours of a run before spending them.

    python -m r1hpc.estimate --params 7B --tokens 1T --gpu a100-80gb --num-gpus 256
    python -m r1hpc.estimate jobs/train.yaml --gpu h100 train.num_steps=20000
    python -m r1hpc.estimate jobs/r1.yaml                                # a chain: each stage, and the sum
    python -m r1hpc.estimate --params 7B --data-gb 100 --method seed     # the article's formula
    python -m r1hpc.estimate RUN_DIR --method measured                   # from the steps a run has taken

Prints P10, P50 and P90 of the billed hours, the assumptions, the sources of uncertainty, the save interval
that loses least, and the configurations that fit the card. Numbers may be written 7B, 350M, 1.5e9. For its
accuracy see research/estimator/scores.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import (
    ArgumentParser,
    add_cluster,
    add_job_words,
    add_json,
    add_run_root,
    file_and_overrides,
    print_result,
    run_command,
)
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import run_root_of

if TYPE_CHECKING:  # only for types: --help must be quick
    from r1hpc.plan.hours.estimate import Estimate


def main(argv: Sequence[str]) -> int:
    from r1hpc.plan.hours.flags import METHODS, add_flags, refuse_settled

    parser = ArgumentParser(prog="python -m r1hpc.estimate", description=__doc__)
    add_job_words(parser, "JOB.yaml | KEY=VALUE", "a job file, or flags alone")
    parser.add_argument("--method", choices=METHODS, default="flops", help="default: flops")
    add_json(parser)
    add_run_root(parser)
    add_cluster(parser)
    add_flags(parser)
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    arguments.target, arguments.overrides = file_and_overrides(arguments.words)
    refuse_settled(parser, arguments)
    from r1hpc.plan.hours.from_flags import refuse_without_progress
    from r1hpc.plan.hours.text import estimate_text

    if arguments.method != "measured" and (chain := _chain_file(arguments)):
        return _print_chain(chain, arguments, parser)
    found = _answer(arguments)
    refuse_without_progress(found, arguments)
    found, correction = _corrected(found, arguments)
    print_result({**found.to_json(), **correction}, estimate_text(found), arguments.json)
    return 0


def _chain_file(arguments: argparse.Namespace) -> Path | None:
    """Return the job file if it is a chain's, else None."""
    if arguments.target is None:
        return None
    from r1hpc.config.assets import find_job
    from r1hpc.config.load import is_chain_file

    job = find_job(arguments.target)
    return job if is_chain_file(job) else None


def _print_chain(job: Path, arguments: argparse.Namespace, parser: ArgumentParser) -> int:
    from r1hpc.plan.hours.flags import refuse_settled_by_chain
    from r1hpc.plan.topology.gpus import find_gpu
    from r1hpc.submission.estimate import estimate_chain
    from r1hpc.submission.order import Order, Purpose

    refuse_settled_by_chain(parser, arguments, job)
    card = []
    if arguments.gpu:
        card = [f"cluster.gpu_type={find_gpu(arguments.gpu).name}", "resources.gpu_type=null"]
    order = Order(
        Purpose.estimate,
        "slurm",
        overrides=(*arguments.overrides, *card),
        cluster=arguments.cluster,
        run_root=run_root_of(arguments.run_root),
    )
    found = estimate_chain(job, order)
    print_result(found.to_json(), found.text(), arguments.json)
    return 0


def _answer(arguments: argparse.Namespace) -> Estimate:
    from r1hpc.plan.hours.from_flags import estimate_of_flags, rates_of_flags

    if arguments.method == "measured":
        from r1hpc.accounting.open_ledger import measured_run
        from r1hpc.base.choose_run import choose_run

        if arguments.target is None:
            raise UsageError(
                "--method measured needs a run: python -m r1hpc.estimate RUN_DIR --method measured"
            )
        return measured_run(choose_run(arguments.target, arguments.run_root), time.time())
    if arguments.target is not None:
        from r1hpc.submission.estimate import estimate_job

        return estimate_job(
            arguments.target,
            arguments.overrides,
            cluster=arguments.cluster,
            gpu=arguments.gpu,
            num_gpus=arguments.num_gpus,
            rates=rates_of_flags(arguments),
            by_article=arguments.method == "seed",
        )
    if arguments.overrides:
        raise UsageError(f"{printable(arguments.overrides[0])} changes a job file, and none is given")
    return estimate_of_flags(arguments)


def _corrected(found: Estimate, arguments: argparse.Namespace) -> tuple[Estimate, dict[str, Any]]:
    """Correct the estimate by this site's finished runs; unchanged if there are none."""
    from r1hpc.plan.hours.text import hours_text

    root = run_root_of(arguments.run_root)
    if found.method != "flops" or not root.is_dir():
        return found, {}
    # Deferred: a machine without runs needs no accounting.
    from r1hpc.accounting.calibrate import corrected, finished_runs

    stage = str(found.assumptions.get("stage") or ("rl" if found.phases else "pretrain"))
    now, extra = corrected(found, stage, finished_runs(root.absolute()))
    if extra:
        hours = found.gpu_hours or found.node_hours
        before = "" if hours is None else f"; before that {hours_text(hours)}"
        note = f"corrected by this site's runs: {extra['correction']['basis']}{before}"
        now = replace(now, notes=(note, *now.notes))
    return now, extra


if __name__ == "__main__":
    run_command(main)
