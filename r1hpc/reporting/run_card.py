"""One run on the page: its facts, what stands out in it, and its charts.

html = run_card(run)
paths = draw_pngs(run.run, run.summary, run.run.report)     # the same charts as files
"""

from collections.abc import Sequence
from pathlib import Path

from r1hpc.accounting.budget import format_hours
from r1hpc.accounting.ledger import RunLedger
from r1hpc.base.rundir import RunDir
from r1hpc.plan.parts import STAGES_IN_PARTS
from r1hpc.reporting.drawing import inline
from r1hpc.reporting.html import text
from r1hpc.reporting.progress import read_progress
from r1hpc.reporting.run_charts import STUB, RunData, charts_of_run, write_pngs
from r1hpc.telemetry.diagnose import QUICK_BYTES, diagnose
from r1hpc.telemetry.evaluations import read_evaluations
from r1hpc.telemetry.findings import Finding
from r1hpc.telemetry.gpu_history import all_series
from r1hpc.telemetry.metrics import read_events
from r1hpc.telemetry.summary import RunSummary

_MAIN = ("loss", "reward", "throughput", "utilisation", "power")
"""Charts of a run among others; a page of one run has all."""
_NOTHING = "<p class=muted>It has taken no step yet.</p>"


def run_card(run: RunLedger, is_alone: bool = False) -> str:
    """The HTML of one run. `is_alone`: it is what the page is about, so everything is drawn."""
    data = read_run_data(run.run, run.summary)
    charts = charts_of_run(data)
    nothing = "" if run.stage in STAGES_IN_PARTS else _NOTHING
    shown = [chart for name, chart in charts.items() if is_alone or name in _MAIN]
    stub = f'<p class="stub">The GPU readings come from {text(STUB)}.</p>' if data.is_stub else ""
    figures = "".join(
        f"<figure><figcaption>{text(each.title)}</figcaption>{inline(each)}</figure>" for each in shown
    )
    return (
        f'<section class="card run" id="run-{text(run.run_id)}"><h3>{text(run.run_id)} '
        f'<span class="badge {text(run.state)}">{text(run.state)}</span></h3>'
        f'<p class="facts">{" · ".join(text(fact) for fact in _facts(run))}</p>'
        f'{_findings(_newest_findings(run))}{stub}<div class="figures">{figures or nothing}</div></section>'
    )


def draw_pngs(run: RunDir, summary: RunSummary, folder: Path, prefix: str = "") -> list[Path]:
    """What there is data for, as PNG files in `folder`, their names begun by `prefix`; their paths."""
    data = read_run_data(run, summary)
    return write_pngs(run.run_id, charts_of_run(data), folder, STUB if data.is_stub else "", prefix)


def read_run_data(run: RunDir, summary: RunSummary) -> RunData:
    """What is drawn of a run, from its folder."""
    events = read_events(run)
    return RunData(
        attempts=summary.attempts,
        steps=list(summary.steps.effective.values()),
        lost=summary.steps.lost,
        saves=[event["time"] for event in events if event.get("event") == "save" and "time" in event],
        evaluations={step: found["greedy"] for step, found in read_evaluations(run).items()},
        gpus=all_series(summary.gpus),
    )


def _facts(run: RunLedger) -> list[str]:
    planned = f" of {format_hours(run.planned.p50)} planned" if run.planned else ""
    whole = run.used
    facts = [
        f"{format_hours(whole)} {run.unit}{planned}",
        f"{100 * run.parts['useful'] / whole:.0f} % useful" if whole else "nothing used yet",
        f"{len(run.attempts)} attempt{'s' * (len(run.attempts) != 1)}",
        f"stage {run.stage}",
        run.user,
    ]
    if run.stage in STAGES_IN_PARTS:
        now = read_progress(run)
        of = "" if now.num_steps is None else f" of {now.num_steps:,}"
        facts.append(f"part {now.global_step:,}{of}")
    if run.mfu is not None:
        facts.insert(2, f"MFU {100 * run.mfu:.1f} %")
    return facts


def _newest_findings(run: RunLedger) -> Sequence[Finding]:
    """What stands out in the newest attempt; steps are judged, of which a server has none."""
    if not run.summary.attempts or run.stage == "serve":
        return ()
    newest = run.summary.attempts[-1]
    return diagnose(run.run, newest.attempt, end=newest.end, max_bytes=QUICK_BYTES).findings


def _findings(found: Sequence[Finding]) -> str:
    """Each kind once, the newest first; nothing where nothing stands out."""
    first = {finding.code: finding for finding in reversed(found)}
    items = "".join(
        f'<li class="{each.severity.value}"><b>{text(each.code.replace("_", " "))}</b> '
        f'{text(each.sentence)} <span class="muted">Try: {text(each.advice)}</span></li>'
        for each in reversed(first.values())
    )
    return f'<ul class="findings">{items}</ul>' if items else ""
