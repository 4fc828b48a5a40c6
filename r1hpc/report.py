"""Report GPU-hours and how they were used.

    python -m r1hpc.report                            # the newest run
    python -m r1hpc.report --plots                    # and its plots, in RUN_DIR/report/
    python -m r1hpc.report RUN_DIR RUN_DIR --json     # several runs, one JSON object
    python -m r1hpc.report CHAIN                      # the stages of a chain, and their sum
    python -m r1hpc.report --format html              # a page of all runs: RUN_ROOT/report.html
    python -m r1hpc.report --compare RUN_DIR RUN_DIR  # the same, bit by bit? 0: yes, 1: no
    python -m r1hpc.report --compare 'base-*' 'new-*' # two groups, over their seeds: patterns or sweeps
    python -m r1hpc.report --start 2026-05-01         # all your jobs since then, from sacct
    python -m r1hpc.report --sacct-file FILE          # the same from what sacct printed
    python -m r1hpc.report --account LAB --by user month    # who used how much, and when

gpu_hours = GPUs x allocated wall hours, busy or idle, over all attempts; an allocation over midnight is split
between its days. Totals come from Slurm's records if available, else from the run folders. The run's own
record says how the hours were used.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import time
from argparse import BooleanOptionalAction
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import RUN_NAMES, choose_run, existing_run_root, list_runs
from r1hpc.base.cli import (
    ArgumentParser,
    add_run_root,
    offer,
    print_json,
    print_result,
    refuse_folder,
    run_command,
)
from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.base.run_dir import SWEEP, RunDir, places_of, run_root_of
from r1hpc.base.tables import coloured, wrap

if TYPE_CHECKING:  # only for types: --help must be quick
    from r1hpc.accounting.account import SacctFile
    from r1hpc.accounting.hours import Selection
    from r1hpc.accounting.open_ledger import RunReport

_OWNERS = ("user", "account", "partition", "qos", "cluster")
_BY = (*_OWNERS, "gpu", "state", "cause", "day", "month", "run", "stage")
_MOST_DIFFERENCES = 10
_SECONDS_DIGITS = 9
"""Digits of Unix seconds since March 1973; 20260501 has eight."""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    with contextlib.ExitStack() as opened:
        return _report(arguments, opened)


def _report(arguments: Any, opened: contextlib.ExitStack) -> int:
    from r1hpc.accounting.account import hours_of_all, open_sacct_file, records_of_file
    from r1hpc.accounting.open_ledger import report_run
    from r1hpc.attempt.state.state import slurm_jobs
    from r1hpc.slurm.sacct import PRINTED_BY

    form = "json" if arguments.json else arguments.format
    if arguments.by and (arguments.run_dirs or form == "html"):
        raise UsageError("--by sums all selected jobs as text, json or csv: leave RUN_DIR and html out")
    if arguments.compare:
        return _compare(arguments, form)
    path = arguments.sacct_file  # or a pipe
    if path is not None and str(path) != "-" and (path.is_dir() or not path.exists()):
        raise UsageError(f"--sacct-file: there is no file {path}; make it with: {PRINTED_BY}")
    file = None if path is None else opened.enter_context(open_sacct_file(path))
    if arguments.run_dirs and file is None and (arguments.user or arguments.account):
        raise UsageError("--user and --account choose among Slurm's records: leave RUN_DIR out")
    selection = _selection(arguments)
    everything = any((file, arguments.start, arguments.end, arguments.user, arguments.account, selection.by))
    if form == "html":
        refuse_folder(arguments.out)
        return _write_page(arguments, selection, file, everything)
    if arguments.out is not None:
        raise UsageError("--out FILE goes with --format html; the other formats are printed")
    if everything and not arguments.run_dirs:
        return _print_hours(*hours_of_all(run_root_of(arguments.run_root), selection, file), form)
    now = time.time()
    runs = _named(arguments.run_dirs or [None], arguments.run_root)
    jobs = {job for run in runs for job in slurm_jobs(run)}
    records = None if file is None else records_of_file(file, jobs, selection)
    reports = [report_run(run, now, records) for run in runs]
    chosen = (selection.start, selection.end, selection.user, selection.account)
    if chosen != (None,) * len(chosen):
        reports = [replace(report, ledger=report.ledger.selected(*chosen)) for report in reports]
    plots: dict[Path, list[Path]] = {}
    if arguments.plots:
        from r1hpc.reporting.page import draw_pngs  # deferred: no other format draws

        plots = {each.run.path: draw_pngs(each.ledger) for each in reports}
    _print_reports(reports, plots, selection, form)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.report", description=__doc__)
    runs = parser.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", help="run folders, or names of runs")
    offer(runs, RUN_NAMES)
    parser.add_argument("--compare", action="store_true", help="compare two runs step by step, by their bits")
    parser.add_argument(
        "--sacct-file", type=Path, metavar="FILE", help="take Slurm's records from FILE, also .gz or -"
    )
    parser.add_argument(
        "--gres-per-gpu", metavar="shard=N,mps=N", help="how many shards, or MPS parts, make one GPU"
    )
    parser.add_argument(
        "--start", metavar="TIME", help="count from then on, e.g. 2026-05-01 or 2026-05-01T08:00"
    )
    parser.add_argument("--end", metavar="TIME", help="count until then")
    parser.add_argument("--user", help="only this user's jobs")
    parser.add_argument("--account", help="only jobs of this account")
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="KEY", help=f"sum by these keys together: {', '.join(_BY)}"
    )
    parser.add_argument("--format", choices=("text", "json", "csv", "html"), default="text")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the HTML page; default report/index.html, report.html"
    )
    parser.add_argument("--json", action="store_true", help="as --format json")
    parser.add_argument(
        "--plots", action=BooleanOptionalAction, default=False, help="draw PNGs into RUN_DIR/report/"
    )
    add_run_root(parser)
    return parser


def _named(given: Sequence[str | None], run_root: str | None) -> list[RunDir]:
    runs = [run for each in given for run in _runs(each, run_root)]
    return list({run.path.resolve(): run for run in runs}.values())


def _runs(given: str | None, run_root: str | None) -> list[RunDir]:
    """Return the named run, the submitted stages of a chain, or the points of a sweep."""
    for folder in places_of(given, run_root) if given else ():
        if (folder / SWEEP).is_file():
            return list_runs(folder)[::-1]
    from r1hpc.submission.chain.folder import choose_chain

    chain = choose_chain(given, run_root)
    if chain is None:
        return [choose_run(given, run_root)]
    # Deferred: it loads YAML, which is slower to import than the report of a run may take.
    from r1hpc.submission.chain.file import open_definition

    runs = [chain.stage(name) for name in open_definition(chain).names]
    submitted = [run for run in runs if run.attempts.is_file()]
    if not submitted:
        raise UsageError(f"no stage of the chain {chain.name} was submitted yet: there is nothing to report")
    return submitted


def _selection(arguments: Any) -> Selection:
    from r1hpc.accounting.hours import Selection
    from r1hpc.slurm.gres import parse_shares
    from r1hpc.slurm.sacct import parse_when

    for flag, given in (("--user", arguments.user), ("--account", arguments.account)):
        if given is not None and not given.strip():
            raise UsageError(f"{flag} is empty: name one, or leave it out")
    for flag, given in (("--start", arguments.start), ("--end", arguments.end)):
        if given and given.isdecimal() and len(given) < _SECONDS_DIGITS:
            raise UsageError(f"{flag} {given} would be seconds since 1970: write it as 2026-05-01")
    start, end = parse_when(arguments.start or ""), parse_when(arguments.end or "")
    if start is not None and end is not None and start >= end:
        raise UsageError(f"--start {arguments.start} is not before --end {arguments.end}")
    shares = parse_shares(arguments.gres_per_gpu, "--gres-per-gpu") if arguments.gres_per_gpu else {}
    by = tuple(dict.fromkeys(key for given in arguments.by for key in given.split(",")))
    for key in by:
        if key not in _BY:
            raise UsageError(f"--by has no key {key!r}{nearest(key, _BY)}: choose among {', '.join(_BY)}")
    return Selection(arguments.user, arguments.account, start, end, shares=shares, by=by)


def _write_page(arguments: Any, selection: Selection, file: SacctFile | None, everything: bool) -> int:
    """Write the page of the named runs, else of all under the run root; print its path."""
    from r1hpc.accounting.account import hours_of_all, records_of_file, with_runs
    from r1hpc.attempt.state.state import slurm_jobs

    # Deferred: no other format draws.
    from r1hpc.reporting.page import publish

    root = run_root_of(arguments.run_root)
    runs: list[RunDir] | None = None
    hours: dict[str, Any] | None = None
    jobs: Collection[str]
    if arguments.run_dirs:
        runs = _named(arguments.run_dirs, arguments.run_root)
        jobs = {job for run in runs for job in slurm_jobs(run)}
    else:
        existing_run_root(arguments.run_root)
        jobs = with_runs(selection, root).runs
    records = [] if file is None else records_of_file(file, jobs, selection)
    if runs is None and everything:
        found, source, _ = hours_of_all(root, selection, file)
        hours = found if source == "sacct" else None
    page = publish(runs, root, arguments.out, time.time(), hours=hours, records=records, selection=selection)
    print(page)
    return 0


def _print_hours(hours: dict[str, Any], source: str, note: str, form: str) -> int:
    from r1hpc.reporting.text import groups_text, hours_text

    groups: dict[str, Any] = {key: hours.pop(key) for key in ("by", "groups", "all") if key in hours}
    if form == "json":
        sums = {key: value for key, value in hours.items() if not groups or "by_" not in key}
        print_json({"gpu_hours": {**sums, "source": source}, **groups, "note": note})
        return 0
    note = f"These are {note}" if source == "run" else note
    if form == "csv":
        _print_csv(hours, groups)
        if note:
            print(note, file=sys.stderr)
    else:
        shown = groups_text(groups) if groups else hours_text(hours)
        print(shown, *([wrap(note)] if note else []), sep="\n")
    return 0


def _print_reports(
    reports: Sequence[RunReport], plots: dict[Path, list[Path]], selection: Selection, form: str
) -> None:
    from r1hpc.accounting.hours import fold_hours
    from r1hpc.reporting.results import read_results, results_text
    from r1hpc.reporting.text import as_text, hours_text
    from r1hpc.telemetry.diagnosis.timeline import Split

    hours = fold_hours(held for each in reports for held in each.ledger.allocations)
    if form == "json":
        runs = [{**each.to_json(), "plots": list(map(str, plots.get(each.run.path, [])))} for each in reports]
        split = sum((each.ledger.split() for each in reports), Split()).in_hours()
        queue_s = sum(each.ledger.queue_s for each in reports)
        named = {name for each in reports for name in each.ledger.source.split(" and ")}
        total = {**hours, "source": " and ".join(sorted(named, reverse=True))}
        print_json({"gpu_hours": total, "split": {**split, "queue_s": queue_s}, "runs": runs})
    elif form == "csv":
        _print_csv(hours)
    else:
        texts = [as_text(each, plots.get(each.run.path, [])) for each in reports]
        if len(reports) > 1 or selection.start is not None or selection.end is not None:
            texts.append(hours_text(hours))
        if len(reports) > 1:
            texts.append(results_text(read_results(each.ledger for each in reports)))
        print(coloured("\n\n".join(texts)))


def _print_csv(hours: dict[str, Any], groups: dict[str, Any] | None = None) -> None:
    """Print group,key,gpu_hours: one line for the total and one for each key of each group; or the groups of
    `--by`, under their own header."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if groups:
        writer.writerows([[*groups["by"], *groups["all"]], *(row.values() for row in groups["groups"])])
        return
    writer.writerow(("group", "key", "gpu_hours"))
    writer.writerow(("total", "", hours["total"]))
    for name, group in hours.items():
        if name.startswith("by_"):
            writer.writerows((name.removeprefix("by_"), key, value) for key, value in group.items())


def _compare(arguments: Any, form: str) -> int:
    from r1hpc.telemetry.records.metrics import COMPARED, Difference, compare, read_steps

    if len(arguments.run_dirs) != 2:
        raise UsageError("--compare takes two run folders: report --compare RUN_DIR RUN_DIR")
    if arguments.out is not None or form == "html":
        raise UsageError("--compare makes no page: leave out --out and --format html")
    from r1hpc.sweeps.groups import compare_groups, is_group

    root = run_root_of(arguments.run_root)
    if any(is_group(given, root) for given in arguments.run_dirs):
        groups = compare_groups(arguments.run_dirs[0], arguments.run_dirs[1], root)
        print_result(groups.to_json(), groups.text(), form == "json")
        return 0
    a, b = (choose_run(given, arguments.run_root) for given in arguments.run_dirs)
    differences, steps_of_a, steps_of_b = compare(a, b), read_steps(a).effective, read_steps(b).effective
    num_steps = len(steps_of_a)
    steps = [*steps_of_a.values(), *steps_of_b.values()]
    keys = [key for key in COMPARED if any(step.value(key) is not None for step in steps)]
    if not differences and not num_steps:
        raise UsageError(
            f"{a.run_id} and {b.run_id} report no steps: there is nothing to compare. A script's own loop "
            "reports them with attempt() of r1hpc.client.run"
        )
    if form == "json":
        listed = [d._asdict() for d in differences]
        print_json({"identical": not differences, "compared": keys, "differences": listed})
    elif form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([Difference._fields, *differences])
    elif not differences:
        what = f"all {num_steps} steps" if num_steps > 1 else "their one step"
        print(
            f"{a.run_id} and {b.run_id} are the same to the bit: {', '.join(keys) or 'no number'} of {what}"
        )
        if missing := [key for key in COMPARED if key not in keys]:
            print(f"not compared, since neither recorded it: {', '.join(missing)}")
    else:
        different = {d.global_step for d in differences}
        counts = Counter(d.key for d in differences)
        which = ", ".join(f"{key} ({count})" for key, count in counts.items())
        where = f"{len(different)} steps, first in step {min(different)}"
        print(f"{a.run_id} and {b.run_id} differ in {where}: {which}")
        if same := [key for key in keys if key not in counts]:
            print(f"  the same in all steps that both took: {', '.join(same)}")
        for d in differences[:_MOST_DIFFERENCES]:
            print(f"  step {d.global_step}  {d.key}: {d.a}  {d.b}")
        if len(differences) > _MOST_DIFFERENCES:
            print(f"  and {len(differences) - _MOST_DIFFERENCES} more (--json lists all)")
    return 1 if differences else 0


if __name__ == "__main__":
    run_command(main)
