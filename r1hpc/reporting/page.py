"""Write the page of `report --format html`: results, curves of the newest runs, used and planned hours.

`draw_pngs` draws the charts of `report --plots`. The page has no script, font, picture or outside address: it
opens from a mail, without a network. Names of runs and users are escaped wherever they appear.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.budget import format_day, format_range
from r1hpc.accounting.budget_status import PACE_DAYS
from r1hpc.accounting.hours import Selection, fold_hours
from r1hpc.accounting.ledger import RunLedger, clip
from r1hpc.accounting.open_ledger import open_ledgers, survey
from r1hpc.attempt.workload import card_of
from r1hpc.base.choose_run import full_name, list_runs
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import write_atomic
from r1hpc.base.run_dir import RunDir, is_chain_or_sweep
from r1hpc.base.tables import cell
from r1hpc.base.units import format_hours
from r1hpc.config.stages import counts_of, is_server
from r1hpc.plan.hours.spread import Spread
from r1hpc.reporting import hours_charts
from r1hpc.reporting.drawing import BAND, FULL, Chart, inline
from r1hpc.reporting.progress import read_progress
from r1hpc.reporting.results import read_results, results_card
from r1hpc.reporting.run_charts import STUB, RunData, charts_of_run, write_pngs
from r1hpc.reporting.style import NONE, card, document, lines, side_by_side, table, text
from r1hpc.reporting.view import RUN_HEADINGS, View, make_view, row_of
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.diagnosis.diagnose import QUICK_BYTES, diagnose
from r1hpc.telemetry.records.evaluations import newest_accuracy, read_evaluations
from r1hpc.telemetry.records.metrics import read_events
from r1hpc.telemetry.records.samples import Sample, has_samples, read_samples, some_wrong_first

_MOST_TABLE = 500
_SOURCES = {"sacct": "Slurm's accounting over all attempts", "run folders": "the run folders"}
_MAIN = ("loss", "throughput", "utilisation", "power")
_MAIN_OF_RL = ("reward", "length", *_MAIN[1:])
"""Charts of a run on a page with others; a page of one run has all."""
_MOST_SAMPLES = 4
_MOST_RESULTS = 20
_MOST_CARDS = 8
"""Runs that get a card, those begun last; the table has the others too."""
_SELECTED = "Only the selection is counted here, so this page says nothing of the budget."
_ALL = Selection()
_GROUPS = ("user", "account", "stage", "partition", "state", "qos")


def head(view: View) -> str:
    attempts = [each for run in view.runs for each in run.attempts]
    span = ""
    if attempts:
        begin, end = min(each.start for each in attempts), max(each.end for each in attempts)
        days = dict.fromkeys(map(format_day, (begin, end)))
        span = f", {' to '.join(days)}"
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(view.now))
    where = f" under {view.run_root.absolute()}" if view.is_whole else ""
    count = f"{len(view.runs)} run{'s' * (len(view.runs) != 1)}{where}"
    words = f"{count}{span}. Counted from {_SOURCES[view.status.source]}; written {made}."
    return f'<header><h1>{text(view.title)}</h1><p class="sub">{text(words)}</p></header>'


def tiles(view: View) -> str:
    """Return the figures that matter most."""
    whole, spent, taken = sum(view.parts.values()), view.spent, view.committed
    granted = view.budget.gpu_hours if view.budget else None
    useful = f"{100 * view.parts['useful'] / whole:.1f} %" if whole else NONE
    others = ("start-up", "save", "lost", "idle")
    wasted = ", ".join(f"{format_hours(view.parts[part])} {part}" for part in others)
    share, left = view.unit, ("Left", NONE, "no budget is set")
    if view.budget is not None and granted is not None:
        share = f"{100 * spent / granted:.0f} % of {format_hours(granted)} {view.unit}"
        end = view.budget.end
        until = time.strftime(" until %d %b", time.localtime(end - 1)) if end else " of what was granted"
        left = ("Left", format_hours(granted - spent), f"{100 * (granted - spent) / granted:.0f} %{until}")
    if not view.is_whole:
        left = ("Planned", NONE, "no estimate was stored")
        if view.planned.p90 > 0:
            left = ("Planned", format_hours(view.planned.p50), _band(view.planned))
    shown = [("Spent", format_hours(spent), share), left, ("Useful", useful, wasted)]
    # Hours of a window and hours to come do not add up.
    if (view.is_whole or any(run.is_live for run in view.runs)) and not any(run.is_cut for run in view.runs):
        shown.append(
            ("Forecast with running and queued", format_hours(spent + taken.p50), _band(taken + spent))
        )
    cells = "".join(
        f'<div class="tile"><div class="k">{text(name)}</div><div class="v">{text(value)}</div>'
        f'<div class="d">{text(words)}</div></div>'
        for name, value, words in shown
    )
    return f'<div class="tiles">{cells}</div>'


def _band(spread: Spread) -> str:
    if spread.p10 == spread.p90:
        return "nothing runs or waits"
    return f"{BAND} {format_range(spread)}"


def budget(view: View) -> Iterator[str]:
    """Yield burn-down and campaign."""
    status, down = view.status, view.burn_down
    if down is not None:
        words = (
            f"{format_hours(down.granted)} GPU-hours granted. {status.num_running} running and "
            f"{status.num_queued} queued will take about {format_hours(status.committed.p50)}."
        )
        until = status.lasts_until(down.left, view.now)
        if until is not None:
            words += f" At the pace of the last {PACE_DAYS} days the rest lasts until {format_day(until)}."
        yield "<h2>Budget</h2>" + _chart_card(hours_charts.burn_down(down), words)
    if view.progress is not None:
        plan, forecast = view.progress.campaign, view.progress.forecast
        words = (
            f"{plan.days:g} days and {format_hours(plan.gpu_hours)} GPU-hours planned; "
            f"{format_hours(view.progress.used)} used; at its end about {format_hours(forecast.p50)} "
            f"({_band(forecast)})."
        )
        chart = hours_charts.campaign(view.progress.stages)
        yield _chart_card(chart, words, f"Campaign: {plan.name}")


def _chart_card(chart: Chart | None, words: str = "", title: str = "") -> str:
    return card(title or chart.title, inline(chart, FULL), words) if chart else ""


def estimates(view: View) -> Iterator[str]:
    """Yield planned against used, with the error of the estimates."""
    runs = view.planned_runs
    chart = hours_charts.planned_against_used(runs, view.unit)
    if chart is not None:
        words = f"The dark line is the estimate's median. {hours_charts.error_words(runs)}"
        alone = len(runs) == 1
        heading, title = ("", "") if alone else ("<h2>Planned against used</h2>", "Each run")
        yield heading + _chart_card(chart, words, title)


def hours(view: View) -> Iterator[str]:
    """Yield where hours went, by run, by day and by cause."""
    unit, used = view.unit, sum(view.parts.values())
    by_run = hours_charts.waste(view.parts_by_run, unit)
    if by_run is not None:
        if len(view.runs) == 1:
            yield _chart_card(by_run)
        else:
            yield "<h2>Where the hours went</h2>"
            yield _chart_card(by_run, f"Shares of the {unit} each run held.", "By run")
        by_cause = hours_charts.lost_by_cause(view.wasted_by_cause, unit, used)
        yield _chart_card(hours_charts.by_day(view.days, unit)) + _chart_card(by_cause)


def tables(view: View) -> Iterator[str]:
    if len(view.runs) == 1 and not view.is_whole:
        return  # its card has the same numbers
    yield "<h2>Tables</h2>"
    more = len(view.runs) - _MOST_TABLE
    shown = table(RUN_HEADINGS, list(map(row_of, view.runs[:_MOST_TABLE])), 4)
    yield card(
        "All runs" if more > 0 or len(view.runs) > 1 else "The run",
        shown,
        f"and {more} older ones" if more > 0 else "",
    )
    cards = []
    for name, rows in view.grouped:
        if len(rows) < 2:
            continue  # it has all of them
        whole = sum(hours for _, hours in rows)
        lines = [[key, format_hours(h), f"{100 * h / whole:.1f} %"] for key, h in rows if whole]
        cards.append(card(f"By {name}", table([name, view.unit, "share"], lines, 1)))
    yield side_by_side(cards)


def notes(view: View) -> str:
    shown = [
        "GPU-hours: GPUs x allocated wall hours, busy or idle, over all attempts; node-hours for a run "
        "without GPUs.",
        "useful: steps that lasted. lost: steps taken again. start-up: until the first step. save: "
        "checkpoints. idle: the rest of what was allocated. Of a server, useful is the time in which it "
        "answered.",
        "MFU leaves recomputation out; peaks are dense bf16. Utilisation is the share of time in which any "
        "kernel ran: 100 % is not busy.",
        "Forecasts are P50 with P10 and P90: by its own pace once a run has done 5 % of its steps, else by "
        "its estimate, else half its time limit.",
        *view.status.notes,
        *view.notes,
    ]
    items = "".join(f"<li>{text(note)}</li>" for note in shown)
    return f'<h2>Notes</h2><div class="card notes"><ul>{items}</ul></div>'


def run_card(run: RunLedger, is_alone: bool = False) -> str:
    """Return the HTML of one run. `is_alone`: the page shows only this run, with every chart."""
    data = read_run_data(run)
    charts = charts_of_run(data)
    nothing = "" if counts_of(run.stage) == "parts" else "<p class=muted>It has taken no step yet.</p>"
    main = _MAIN_OF_RL if "reward" in charts else _MAIN
    shown = [chart for name, chart in charts.items() if is_alone or name in main]
    facts = [*_facts(run), *(f"{name} {value}" for name, value in card_of(run.run, run.stage))]
    stub = f'<p class="stub">The GPU readings come from {text(STUB)}.</p>' if data.is_stub else ""
    figures = "".join(
        f"<figure><figcaption>{text(each.title)}</figcaption>{inline(each)}</figure>" for each in shown
    )
    return (
        f'<section class="card run" id="run-{text(run.run_id)}"><h3>{text(run.run_id)} '
        f'<span class="badge {text(run.state)}">{text(run.state)}</span></h3>'
        f'<p class="facts">{" · ".join(map(text, facts))}</p>'
        f'{_findings(run)}{stub}<div class="figures">{figures or nothing}</div>{_samples(run)}</section>'
    )


def _samples(run: RunLedger) -> str:
    """Show some completions, to be unfolded; empty if the run has kept none."""
    try:
        found = read_samples(run.run) if has_samples(run.run) else []
    except UsageError:
        return ""
    kinds = dict.fromkeys(each.kind for each in found)
    chosen = [some_wrong_first((s for s in found if s.kind == kind), _MOST_SAMPLES) for kind in kinds]
    blocks = "".join(_sample(each) for samples in chosen for each in samples)
    summary = "<summary>Some completions, wrong ones first</summary>"
    return f"<details class=samples>{summary}{blocks}</details>" if blocks else ""


def _sample(sample: Sample) -> str:
    facts = [sample.kind if sample.step is None else f"{sample.kind}, step {sample.step}"]
    facts += ["correct" if sample.correct else "wrong"] if sample.correct is not None else []
    facts += [f"expected {sample.expected}"] if sample.expected else []
    facts += [f"reward {sample.reward:.3f}"] if sample.reward is not None else []
    shown = " · ".join(map(text, facts))
    return f'<p class="facts">{shown}</p>{lines(sample.prompt)}{lines(sample.completion)}'


def draw_pngs(run: RunLedger) -> list[Path]:
    """Draw every chart with data as a PNG file in the run's report folder; return the paths."""
    data = read_run_data(run)
    return write_pngs(run.run_id, charts_of_run(data), run.run.report, STUB if data.is_stub else "")


def read_run_data(run: RunLedger) -> RunData:
    """Read the data of a run's charts from its folder."""
    summary, events = run.summary, read_events(run.run)
    return RunData(
        attempts=summary.attempts,
        steps=list(summary.steps.effective.values()),
        lost=summary.steps.lost,
        saves=[event["time"] for event in events if event.get("event") == "save" and "time" in event],
        evaluations={step: found["greedy"] for step, found in read_evaluations(run.run).items()},
        gpus=[series for node in summary.gpus for series in node.series.values()],
    )


def _facts(run: RunLedger) -> list[str]:
    planned = f" of {format_hours(run.planned.p50)} planned" if run.planned else ""
    facts = [
        f"{format_hours(run.used)} {run.unit}{planned}",
        f"{100 * run.parts['useful'] / run.used:.0f} % useful" if run.used else "nothing used yet",
        f"{len(run.attempts)} attempt{'s' * (len(run.attempts) != 1)}",
        f"stage {run.stage}",
        run.user,
    ]
    if counts_of(run.stage) == "parts":
        now = read_progress(run)
        of = "" if now.num_steps is None else f" of {now.num_steps:,}"
        facts.append(f"part {now.global_step:,}{of}")
    if run.summary.mfu is not None:
        facts.insert(2, f"MFU {100 * run.summary.mfu:.1f} %")
    return facts


def _findings(run: RunLedger) -> str:
    """List the findings in the newest attempt; they judge steps, and a server has none."""
    if not run.summary.attempts or is_server(run.stage):
        return ""
    newest = run.summary.attempts[-1]
    found = diagnose(run.run, newest.attempt, end=newest.end, max_bytes=QUICK_BYTES).findings
    first = {finding.code: finding for finding in reversed(found)}
    items = "".join(
        f'<li class="{each.severity.value}"><b>{text(each.code.replace("_", " "))}</b> '
        f'{text(each.sentence)} <span class="muted">Try: {text(each.advice)}</span></li>'
        for each in reversed(first.values())
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def page(view: View) -> str:
    charts = [
        f"<h2>{view.unit[:1].upper()}{view.unit[1:]}</h2>{tiles(view)}",
        *budget(view),
        *estimates(view),
        *hours(view),
    ]
    bodies = [*charts, *_cards(view)] if view.is_whole else [*_cards(view), *charts]
    warnings = [f'<div class="warn">{text(words)}</div>' for words in view.status.warnings(view.budget)]
    return document(view.title, [head(view), _results(view), *warnings, *bodies, *tables(view), notes(view)])


def _results(view: View) -> str:
    """Return the evaluations of the runs; the last steps if there are none, and on a page of all runs."""
    if not view.is_whole and (evaluated := results_card(read_results(view.runs))):
        return evaluated
    rows = []
    for run in view.runs[:_MOST_RESULTS]:
        accuracy = newest_accuracy(run.run)
        last = next(reversed(run.summary.steps.effective.values()), None)
        if last is None and accuracy is None:
            continue
        reward = None if last is None else last.number("reward")
        shown = "" if reward is not None or last is None else cell(last.loss, ".4f")
        step = "" if last is None else f"{last.global_step:,}"
        rows.append([full_name(run.run), run.stage, step, shown, cell(reward, ".3f"), accuracy or NONE])
    more = f"the newest {_MOST_RESULTS} runs" if len(view.runs) > _MOST_RESULTS else ""
    headings = ("run", "stage", "step", "loss", "reward", "held-out accuracy")
    return card("Results", table(headings, rows, 2), more)


def _cards(view: View) -> Iterator[str]:
    runs, alone = [run for run in view.runs if run.attempts], len(view.runs) == 1
    if runs:
        more = f": the newest {_MOST_CARDS} of {len(runs)}" if len(runs) > _MOST_CARDS else ""
        yield "<h2>The run</h2>" if alone else f"<h2>Runs{more}</h2>"
        newest = sorted(range(len(runs)), key=lambda i: runs[i].attempts[0].start)[-_MOST_CARDS:]
        for run in (runs[i] for i in sorted(newest)):  # a chain stays in its order
            try:
                shown = run_card(run, alone)
            except (R1hpcError, OSError) as error:  # one bad run must not lose the others
                why = error.strerror if isinstance(error, OSError) else str(error)
                shown = card(run.run_id, lines(f"It cannot be drawn: {why}"))
            yield shown


def _own_page(runs: Sequence[RunDir], run_root: Path) -> Path:
    """Return the file of named runs: no two choices of runs share one."""
    if len(runs) == 1:
        return runs[0].report / "index.html"
    parents = {run.path.parent for run in runs}
    folder = parents.pop()
    if not parents and is_chain_or_sweep(folder) and len(runs) == len(list_runs(folder)):
        return folder / "report" / "index.html"
    names = sorted(full_name(run) for run in runs)
    return run_root / f"report-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:8]}.html"


def publish(
    runs: Sequence[RunDir] | None,
    run_root: Path,
    out: Path | None,
    now: float,
    *,
    hours: Mapping[str, Any] | None = None,
    records: Sequence[JobRecord] = (),
    selection: Selection = _ALL,
) -> Path:
    """Write the page; return its path. Raise UsageError if the named runs held nothing in the selection.

    Args:
        runs: the runs on it; None: all under the run root.
        out: the file; None: report/index.html of the run, chain or sweep, RUN_ROOT/report.html for all runs,
            else RUN_ROOT/report-<digest of the names>.html.
        hours: fold_hours of Slurm's records, which then are the hours spent. As with a `selection` the page
            leaves the budget out.
        records: Slurm's records of the runs' jobs, from a file of sacct's output.
        selection: what counts: only runs of this user and account, and what they held in this time.
    """
    is_selected = hours is not None or selection != _ALL
    if runs is None:
        ledgers, notes = survey(run_root, now, records)
    else:
        ledgers, notes = open_ledgers(runs, now, records)
    if (selection.start, selection.end) != (None, None):
        ledgers = clip(ledgers, selection.start, selection.end)
    ledgers = [
        run
        for run in ledgers
        if selection.user in (None, run.user) and selection.account in (None, run.account)
    ]
    if runs is not None and not ledgers:
        named = ", ".join(full_name(run) for run in runs)
        raise UsageError(". ".join([f"{named}: nothing was held in the selection", *notes]))
    if runs is not None and all(run.source == "sacct" for run in ledgers):
        hours = fold_hours(held for run in ledgers for held in run.allocations)
    notes += [_SELECTED] if runs is None and is_selected else []
    path = out or (run_root / "report.html" if runs is None else _own_page(runs, run_root))
    view = make_view(ledgers, run_root, now, notes=notes, whole=runs is None and not is_selected)
    if hours is not None:
        status = replace(view.status, spent=hours["total"], by_day=hours["by_day"], source="sacct")
        groups = {key: hours[f"by_{key}"] for key in _GROUPS if hours.get(f"by_{key}")}
        view = replace(view, status=status, groups=groups)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, page(view))
    return path
