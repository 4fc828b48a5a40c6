"""Put the results of runs that belong together, such as a chain's, into one table.

A run that was also evaluated before its first step has two rows, `grpo@0` and `grpo`, as in `compare`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.accounting.ledger import RunLedger
from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import format_table
from r1hpc.checkpoint.finished import OLD
from r1hpc.config import load
from r1hpc.reporting.style import card, table
from r1hpc.telemetry.records.evaluations import first_and_newest

_ABOUT = (
    "The interval is that of pass@1. Difference: pass@1 minus that of the first row with the same questions."
)


@dataclass(frozen=True)
class Result:
    stage: str
    model: str
    """The stage or the folder that the weights come from."""
    evaluation: dict[str, Any] | None
    """As in evaluation.json."""
    hours: float | None
    """None for the row before the first step, which shares its hours with the next one."""
    unit: str


def read_results(ledgers: Iterable[RunLedger]) -> list[Result]:
    """Return the rows of runs, in their order."""
    found = []
    for ledger in ledgers:
        name, model = ledger.run.run_id, _model(ledger.run)
        if ledger.situation.detail.startswith(OLD):
            name = f"{name} ({ledger.situation.detail})"
        try:
            first, newest = first_and_newest(ledger.run)
        except (R1hpcError, OSError, ValueError, KeyError):  # a damaged record must not hide the others
            first = newest = None
        if first is not None:
            found.append(Result(f"{name}@0", model, first, None, ledger.unit))
        found.append(Result(name, model, newest, ledger.used, ledger.unit))
    return found


def results_text(results: Sequence[Result]) -> str:
    """Return the table for a terminal; empty without results."""
    headings, rows = results_table(results)
    return format_table(headings, rows, right=set(range(2, len(headings))), indent="  ") if rows else ""


def results_card(results: Sequence[Result]) -> str:
    """Return the table as HTML; empty if nothing was evaluated."""
    if not any(each.evaluation for each in results):
        return ""
    return card("Results", table(*results_table(results), 2), _ABOUT)


def results_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows); without an evaluation there are no columns for one."""
    is_evaluated = any(each.evaluation for each in results)
    units = {each.unit.replace("hours", "h") for each in results}
    hours = units.pop() if len(units) == 1 else "hours"
    headings = ["greedy", "pass@1", "95 % interval", "difference"] if is_evaluated else []
    first: dict[tuple[str, ...], float] = {}
    rows = []
    for each in results:
        numbers = ["-", "-", "", ""] if is_evaluated else []
        tasks = each.evaluation.get("tasks", {}) if each.evaluation is not None else {}
        if each.evaluation is not None:
            questions = (*sorted(tasks), str(each.evaluation["num_items"]))  # others are not compared
            numbers = _numbers(each.evaluation, questions, first)
        used = "" if each.hours is None else f"{each.hours:.3f}"
        rows.append([each.stage, each.model, *numbers, used])
        for label, one in tasks.items() if len(tasks) > 1 else ():
            rows.append([f"  {label}", "", *_numbers(one, (label, str(one["num_questions"])), first), ""])
    return ["stage", "model", *headings, hours], rows


def _numbers(
    evaluation: dict[str, Any], questions: tuple[str, ...], first: dict[tuple[str, ...], float]
) -> list[str]:
    """Return the cells of an evaluation; `first` has the first pass@1 of the same questions."""
    greedy, sampled = evaluation["greedy"], evaluation["pass_at"]["1"]
    gain = f"{sampled['value'] - first[questions]:+.3f}" if questions in first else ""
    first.setdefault(questions, sampled["value"])
    interval = f"[{sampled['low']:.3f}, {sampled['high']:.3f}]"
    return [f"{greedy['value']:.3f}", f"{sampled['value']:.3f}", interval, gain]


def _model(run: RunDir) -> str:
    """Return the stage of the same chain, or the folder, that the run's weights come from."""
    try:
        given = load.read(run.config).model.path
    except (R1hpcError, OSError):
        return "-"
    if given is None:
        return "-"
    path = Path(given)
    return path.parent.name if path.name == "model" and path.parent.name else path.name
