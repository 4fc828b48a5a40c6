"""Run one job with many settings, and compare the results.

    python -m r1hpc.sweep job.yaml train.lr=1e-4,3e-4 train.seed=0..2 --dry-run   # points, hours, budget
    python -m r1hpc.sweep job.yaml train.lr=1e-4,3e-4 train.seed=0..2 --at-most 4
    python -m r1hpc.sweep job.yaml train.lr=1e-4,3e-4,1e-3 train.seed=0..2        # again: adds and resumes
    python -m r1hpc.sweep job.yaml train.lr=log:1e-5..1e-3 --samples 20   # random search
    python -m r1hpc.sweep train.py lr=1e-4,3e-4 -- --lr {lr}                      # your own script
    python -m r1hpc.sweep runs/job-sweep --by pass@1 --out sweep.png              # table and chart
    python -m r1hpc.sweep runs/job-sweep --by val --lower                         # any recorded number

Every combination of the values is a point: an ordinary run with its own folder, requeues and checkpoints.
KEY=VALUE with one value is the same for all points. The sweep is called JOB-sweep unless --run-name gives
another name. See docs/own-data.md.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.cli import (
    ArgumentParser,
    add_job_words,
    file_and_overrides,
    print_result,
    refuse_folder,
    run_command,
)
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import run_root_of
from r1hpc.base.tables import wrap

_MOST_LISTED = 200
"""Points that a dry run shows."""


def main(argv: Sequence[str]) -> int:
    from r1hpc.slurm.flags import add_submission_flags

    parser = ArgumentParser(prog="python -m r1hpc.sweep", description=__doc__)
    add_job_words(parser, "JOB.yaml | KEY=A,B | KEY=0..9 | SWEEP", "job and values, or a sweep")
    parser.add_argument("--at-most", type=int, metavar="K", help="points at a time; here 1, on Slurm all")
    parser.add_argument("--samples", type=int, metavar="N", help="draw N samples of log:, uniform: or int:")
    parser.add_argument("--sample-seed", type=int, metavar="S", help="with --samples: draw others (0)")
    parser.add_argument("--rungs", type=int, metavar="R", help="stop points early that are worse than others")
    parser.add_argument(
        "--keep", type=_share, default="1/3", metavar="SHARE", help="with --rungs: share that goes on (1/3)"
    )
    parser.add_argument("--by", metavar="NUMBER", help="compare by loss, eval_loss, pass@1, ...")
    better = parser.add_mutually_exclusive_group()
    better.add_argument("--lower", action="store_true", default=None, help="lower numbers are better")
    better.add_argument("--higher", dest="lower", action="store_false", help="higher numbers are better")
    parser.add_argument("--run-name", metavar="NAME", help="of the sweep; default JOB-sweep")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with SWEEP: also draw a chart, as PNG")
    add_submission_flags(parser)
    arguments, of_script = parser.parse_command(argv, "r1hpc.script.launcher")
    os.umask(0o077)
    word, given = file_and_overrides(arguments.words)
    from r1hpc.sweeps.definition import SweepDir

    sweep = SweepDir.find(word, arguments.run_root) if word is not None and not given else None
    if sweep is not None:
        if (arguments.samples, arguments.sample_seed) != (None, None):
            raise UsageError("--samples and --sample-seed go with the command that submits points")
        from r1hpc.sweeps.table import read_table

        refuse_folder(arguments.out)
        table = read_table(sweep, arguments.by, arguments.lower)
        if arguments.out:
            table.draw(arguments.out)
        shown, text = table.to_json(), table.text()
    else:
        shown = _submit(word, given, of_script, arguments, argv)
        text = as_text(shown)
    print_result(shown, text, arguments.json)
    return 0


def _share(given: str) -> float:
    above, _, below = given.partition("/")
    try:
        share = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{given!r}: give a share between 0 and 1, as 1/3 or 0.5")
    return share


def _submit(
    job: str | None, given: Sequence[str], of_script: Sequence[str], arguments: Any, argv: Sequence[str]
) -> dict[str, Any]:
    from r1hpc.config.assets import find_job
    from r1hpc.slurm.flags import all_overrides
    from r1hpc.submission.order import Order, Purpose
    from r1hpc.sweeps.definition import read_words
    from r1hpc.sweeps.samples import Samples
    from r1hpc.sweeps.submit import Chosen, submit_sweep
    from r1hpc.telemetry.records.direction import direction

    if job is not None and not given:
        find_job(job, "sweep or job")
    if (arguments.by or arguments.lower is not None) and not arguments.rungs:
        raise UsageError("--by, --lower and --higher go with --rungs, or with the folder of a sweep")
    grid, fixed = read_words(given)
    if not (grid or arguments.samples) or arguments.out:
        raise UsageError(
            "nothing varies: give a setting several values, train.lr=1e-4,3e-4 train.seed=0..2, or the "
            "folder of a sweep"
        )
    if arguments.at_most is not None and arguments.at_most < 1:
        raise UsageError(f"--at-most {arguments.at_most}: give 1 or more")
    order = Order(
        Purpose.dry_run if arguments.dry_run else Purpose.start,
        executor=arguments.executor,
        argv=tuple(argv),
        overrides=(*all_overrides(fixed, arguments), *of_script),
        cluster=arguments.cluster,
        run_root=run_root_of(arguments.run_root),
        over_budget=arguments.over_budget,
        job=job,
        run_name=arguments.run_name,
    )
    halving = None
    if arguments.rungs:
        by = arguments.by or "loss"
        halving = Chosen(arguments.rungs, arguments.keep, by, direction(by, arguments.lower))
    if arguments.sample_seed is not None and arguments.samples is None:
        raise UsageError("--sample-seed goes with --samples N")
    samples = None if arguments.samples is None else Samples(arguments.samples, arguments.sample_seed or 0)
    return submit_sweep(order, grid, arguments.at_most, halving, samples)


def _settings(point: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in point["settings"].items())


def as_text(done: dict[str, Any]) -> str:
    """Return the folder, the points by action, what they cost, and the commands for the sweep."""
    from r1hpc.plan.hours.spread import Spread

    path, is_dry_run, waiting = done["sweep_dir"], done["dry_run"], done["not_in_queue"]
    planned = {"submitted": "to submit", "resumed": "to resume"} if is_dry_run else {}
    actions = ", ".join(f"{n:,} {planned.get(action, action)}" for action, n in done["counts"].items())
    lines = [f"sweep    {path}{' (a dry run: nothing was submitted)' if is_dry_run else ''}"]
    lines.append(f"points   {len(done['points']):,}: {actions}")
    for unit, cost in done["estimate"].items():
        if cost is not None:
            what = unit.replace("_", "-").replace("gpu", "GPU")
            lines.append(f"estimate {Spread.of_json(cost).text(what)} for all that is left, to the end")
    if rungs := done["rungs"]:
        course = ", ".join(f"{rung['settings']} to step {rung['step']:,}" for rung in rungs["expected"])
        about = (
            f"rungs    settings expected to go on: {course}. That is {rungs['share']:.0%} of all steps, if"
        )
        lines.append(wrap(f"{about} the seeds of a setting run at once", hanging=" " * 9))
    if is_dry_run:
        lines += [
            f"  {point['point']}  {_settings(point)}  {planned.get(point['action'], point['action'])}"
            for point in done["points"][:_MOST_LISTED]
        ]
        if (more := len(done["points"]) - _MOST_LISTED) > 0:
            lines.append(f"  and {more:,} more points: --json lists all")
    if waiting and not is_dry_run:
        lines.append(f"later    {waiting:,} points are not in the queue yet: give the same command again")
    lines += [wrap(f"note     {note}", hanging=" " * 9) for note in done["notes"]]
    if not is_dry_run:
        lines += [f"table    python -m r1hpc.sweep {path}", f"cancel   python -m r1hpc.cancel {path}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
