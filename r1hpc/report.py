"""GPU-hours, and what they were spent on.

    python -m r1hpc.report                            # the newest run; plots go to RUN_DIR/report/
    python -m r1hpc.report RUN_DIR RUN_DIR --json     # several runs, one JSON object
    python -m r1hpc.report --compare RUN_DIR RUN_DIR  # the same, bit by bit? 0: yes, 1: no
    python -m r1hpc.report --start 2026-05-01         # all your jobs since then, from sacct
    python -m r1hpc.report --sacct-file FILE          # the same from what sacct printed

gpu_hours = GPUs x allocated wall hours, busy or idle, over all attempts; an allocation that ran
over midnight is split between its days. Slurm's own records are used where they can be had; the
run's own record, which knows what each attempt did, is printed beside them.
"""

import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1hpc.attempt.choose import add_run_root, choose_run
from r1hpc.attempt.review import Review, review_run, to_allocation
from r1hpc.attempt.review_text import as_text, hours_text
from r1hpc.base.cli import ArgumentParser, print_json, run_door
from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import RunDir
from r1hpc.slurm.accounting import JobRecord
from r1hpc.slurm.usage import ask_sacct, parse_when, read_sacct
from r1hpc.telemetry.hours import Allocation, fold_hours
from r1hpc.telemetry.metrics import Difference, compare

_MOST_DIFFERENCES = 10
Window = tuple[float | None, float | None]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    form = "json" if arguments.json else arguments.format
    if arguments.compare:
        return _compare(arguments, form)
    if arguments.run_dirs and arguments.sacct_file is None and (arguments.user or arguments.account):
        raise UsageError("--user and --account choose among Slurm's records: leave RUN_DIR out")
    window = _window(arguments)
    records = _records(arguments)
    if records is not None and not arguments.run_dirs:
        return _print_hours([to_allocation(record) for record in records], window, form)
    runs = [choose_run(given, arguments.run_root) for given in arguments.run_dirs or [None]]
    now = time.time()
    reviews = [review_run(run, now, records) for run in runs]
    plots = {} if arguments.no_plots else {review.run.path: draw(review) for review in reviews}
    _print_reviews(reviews, plots, window, form)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.report", description=__doc__)
    parser.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", help="run folders, or names of runs")
    parser.add_argument("--compare", action="store_true", help="compare two runs step by step, by their bits")
    parser.add_argument("--sacct-file", type=Path, metavar="FILE", help="take Slurm's records from FILE")
    parser.add_argument(
        "--start", metavar="TIME", help="count from then on, e.g. 2026-05-01 or 2026-05-01T08:00"
    )
    parser.add_argument("--end", metavar="TIME", help="count until then")
    parser.add_argument("--user", help="only this user's jobs")
    parser.add_argument("--account", help="only jobs of this account")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text")
    parser.add_argument("--json", action="store_true", help="as --format json")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing into RUN_DIR/report/")
    add_run_root(parser)
    return parser


def draw(review: Review) -> list[Path]:
    """The run's plots, in its report folder."""
    # Deferred: matplotlib takes a second that no other door should pay.
    from r1hpc.telemetry.plots import draw_all

    return draw_all(review.run, review.summary, review.run.report)


def _records(arguments: Any) -> list[JobRecord] | None:
    """Slurm's records, where the arguments ask for them; None: each run sees to its own."""
    selected = any((arguments.start, arguments.end, arguments.user, arguments.account))
    if arguments.sacct_file is not None:
        text = arguments.sacct_file.read_text("utf-8-sig", "replace")
        found = read_sacct(text, str(arguments.sacct_file))
    elif selected and not arguments.run_dirs:
        found = ask_sacct(arguments.start, arguments.end, arguments.user, arguments.account)
    else:
        return None
    return [
        record
        for record in found
        if arguments.user in (None, record.user) and arguments.account in (None, record.account)
    ]


def clip(allocations: Sequence[Allocation], start: float | None, end: float | None) -> list[Allocation]:
    """The parts of the allocations that lie between `start` and `end`."""
    clipped = [
        replace(a, start=max(a.start, start or a.start), end=min(a.end, a.end if end is None else end))
        for a in allocations
    ]
    return [a for a in clipped if a.end > a.start]


def _window(arguments: Any) -> Window:
    window = parse_when(arguments.start or ""), parse_when(arguments.end or "")
    if window[0] is not None and window[1] is not None and window[0] >= window[1]:
        raise UsageError(f"--start {arguments.start} is not before --end {arguments.end}")
    return window


def _print_hours(allocations: Sequence[Allocation], window: Window, form: str) -> int:
    hours = fold_hours(clip(allocations, *window))
    if form == "json":
        print_json({"gpu_hours": {**hours, "source": "sacct"}})
    elif form == "csv":
        _print_csv(hours)
    else:
        print(hours_text(hours))
    return 0


def _print_reviews(
    reviews: Sequence[Review], plots: dict[Path, list[Path]], window: Window, form: str
) -> None:
    hours = fold_hours([a for review in reviews for a in clip(review.allocations, *window)])
    sources = {review.source for review in reviews}
    if form == "json":
        runs = [
            {**review.to_json(), "plots": list(map(str, plots.get(review.run.path, [])))}
            for review in reviews
        ]
        source = "sacct" if sources == {"sacct"} else "run" if sources == {"run"} else "sacct and run"
        print_json({"gpu_hours": {**hours, "source": source}, "runs": runs})
    elif form == "csv":
        _print_csv(hours)
    else:
        texts = [as_text(review, plots.get(review.run.path, [])) for review in reviews]
        if len(reviews) > 1 or window != (None, None):
            texts.append(hours_text(hours))
        print("\n\n".join(texts))


def _print_csv(hours: dict[str, Any]) -> None:
    """group,key,gpu_hours: one line for the total and one for each key of each group."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("group", "key", "gpu_hours"))
    writer.writerow(("total", "", hours["total"]))
    for name, group in hours.items():
        if name.startswith("by_"):
            writer.writerows((name.removeprefix("by_"), key, value) for key, value in group.items())


def _compare(arguments: Any, form: str) -> int:
    if len(arguments.run_dirs) != 2:
        raise UsageError("--compare takes two run folders: report --compare RUN_DIR RUN_DIR")
    a, b = (choose_run(given, arguments.run_root) for given in arguments.run_dirs)
    differences = compare(a, b)
    if form == "json":
        print_json({"identical": not differences, "differences": [d._asdict() for d in differences]})
    elif form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([Difference._fields, *differences])
    else:
        print(_differences_text(a, b, differences))
    return 1 if differences else 0


def _differences_text(a: RunDir, b: RunDir, differences: Sequence[Difference]) -> str:
    if not differences:
        return f"{a.run_id} and {b.run_id} are the same to the bit: loss, grad_norm and lr of every step"
    steps = sorted({difference.global_step for difference in differences})
    lines = [f"{a.run_id} and {b.run_id} differ in {len(steps)} steps, first in step {steps[0]}:"]
    lines += [f"  step {d.global_step}  {d.key}: {d.a}  {d.b}" for d in differences[:_MOST_DIFFERENCES]]
    if len(differences) > _MOST_DIFFERENCES:
        lines.append(f"  and {len(differences) - _MOST_DIFFERENCES} more (--json lists all)")
    return "\n".join(lines)


if __name__ == "__main__":
    run_door(main)
