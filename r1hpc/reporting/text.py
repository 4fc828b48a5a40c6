"""Format the report of a run, or totals of hours, for a terminal: at its width, without colour."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import RunReport
from r1hpc.attempt.workload import card_of
from r1hpc.base.tables import bar, cell, format_table, share, wrap
from r1hpc.base.units import format_bytes, format_duration
from r1hpc.config.stages import counts_of, is_server
from r1hpc.plan.hours.spread import Spread
from r1hpc.telemetry.records.attempts import Attempt
from r1hpc.telemetry.records.evaluations import held_out_lines
from r1hpc.telemetry.records.metrics import Audit, format_ranges

_MOST_ROWS = 20
"""Rows of a table; --json and --format csv have all."""
_JOULES_PER_KWH = 3.6e6
_WHOSE = {
    "sacct": "sacct -D",
    "run": "r1hpc's own records (no sacct here)",
    "sacct and run": "sacct -D and, for attempts it does not know, the run's own record",
}
_PARTS: tuple[tuple[str, str], ...] = (
    ("useful", "steps that lasted"),
    ("lost", "steps done again, or lost"),
    ("startup", "start-up"),
    ("save", "saves"),
    ("idle", "idle, no step"),
)
_PARTS_OF_COMMAND = (("useful", "the script, which reports no steps: not split"),)
_PARTS_OF_SERVER = (("useful", "answering"), ("startup", "start-up"), ("idle", "idle, no request"))
_HEADINGS = ("#", "cause", "start", "duration", "nodes", "GPUs", "steps", "lost", "committed", "GPU-hours")
_GROUP_COLUMNS: dict[str, Callable[[Any], str]] = {
    **{"gpu_hours": "{:,.2f}".format, "share": "{:.1%}".format, "starts": "{:,}".format},
    **dict.fromkeys(("wait_p50_s", "wait_p90_s"), lambda s: "-" if s is None else format_duration(s)),
}
_HARMLESS = ("gpu_idle", "applications_clocks_setting")


def as_text(found: RunReport, plots: Sequence[Path] = ()) -> str:
    """Return the complete report of one run."""
    ledger = found.ledger
    detail = f"  ({ledger.situation.detail})" if ledger.situation.detail else ""
    card = card_of(found.run, ledger.stage)
    results = held_out_lines(found.run) or [f"{name:6} {value}" for name, value in card]
    useful, lost = ledger.summary.num_useful, ledger.summary.num_lost
    steps = f"{useful} useful, {lost} lost"
    if lost:
        steps += f" ({share(lost, useful + lost).strip()} of those taken)"
    if ledger.is_cut:
        steps += ", in all its time"
    blocks = [
        wrap(f"{ledger.run.run_id}: {ledger.state}{detail}") + f"\n  {ledger.run.path}",
        _attempts(ledger),
        _hours(ledger),
        ledger_text(ledger),
        f"Steps  {steps}\nData   {_audit_text(found.audit)}",
        "\n".join(results),
        *_gpus(found.gpus),
        "\n".join(wrap(f"note: {note}", hanging="  ") for note in ledger.notes),
    ]
    if plots:
        blocks.append("Plots\n" + "\n".join(f"  {path}" for path in plots))
    return "\n\n".join(block for block in blocks if block)


def ledger_text(ledger: RunLedger) -> str:
    """Return a table of where the GPU-hours went, or the node-hours of a run without GPUs."""
    split, unit = ledger.split(), "GPU-hours"
    if not split.allocated:
        split, unit = ledger.node_split(), "node-hours"
    if not split.allocated:
        return "\n".join(_against_plan(ledger.planned, 0.0, "hours"))
    has_steps = counts_of(ledger.stage) or any(each.num_steps for each in ledger.summary.attempts)
    parts = _PARTS if has_steps else _PARTS_OF_COMMAND
    if is_server(ledger.stage):
        parts = _PARTS_OF_SERVER
    rows = []
    for part, words in parts:
        spent = getattr(split, part)
        columns = (share(spent, split.allocated), bar(spent, split.allocated))
        rows.append((words, f"{spent / 3_600_000:,.3f}", *columns))
    table = format_table(("spent on", unit, "share", ""), rows, right={1, 2}, indent="  ")
    heading = f"{split.allocated / 3_600_000:,.3f} {unit} by {_WHOSE[ledger.source]}"
    heading += f"; {format_duration(ledger.queue_s)} in the queue"
    return "\n".join(
        [wrap(heading), *_against_plan(ledger.planned, split.allocated / 3_600_000, unit), table]
    )


def _against_plan(planned: Spread | None, used: float, unit: str) -> list[str]:
    if planned is None or planned.p50 <= 0:
        return []
    hours, low, high = (f"{value:,.4g}" for value in (planned.p50, planned.p10, planned.p90))
    used_up = f"{100 * used / planned.p50:.0f} % of that used"
    return [wrap(f"planned {hours} {unit} (P10 {low}, P90 {high}); {used_up}")]


def hours_text(hours: dict[str, Any]) -> str:
    """Return fold_hours as text: a small table for each group that adds something to the total."""
    others = f"node-hours: {hours['node_hours']:,.2f}"
    if billing := hours.get("billing_hours", 0.0):
        others += f", billing TRES-hours: {billing:,.2f}"
    lines = [f"GPU-hours: {hours['total']:,.2f}   ({others})"]
    for name, group in hours.items():
        _, is_group, key = name.partition("by_")
        if not is_group or not group:
            continue
        unit, total = ("billing", billing) if name.startswith("billing") else ("GPU-hours", hours["total"])
        listed = _most(name, group)
        largest = max(value for _, value in listed)
        rows = [(label, f"{value:,.2f}", share(value, total), bar(value, largest)) for label, value in listed]
        heading = (key, unit, "share", "")
        lines += ["", format_table(heading, rows, right={1, 2}, indent="  ")]
    return "\n".join(lines)


def groups_text(groups: dict[str, Any]) -> str:
    """Return the sums of `report --by` as a table, with their total in the last row."""
    by, total = groups["by"], groups["all"]
    rows = [
        [*(row.get(key, "") for key in by), *(form(row[name]) for name, form in _GROUP_COLUMNS.items())]
        for row in (*groups["groups"], {by[0]: "all", **total})
    ]
    headings = [*by, "GPU-hours", "share", "starts", "median wait", "P90 wait"]
    return format_table(headings, rows, right=range(len(by), len(headings)))


def _most(name: str, group: dict[str, float]) -> list[tuple[str, float]]:
    """Return the rows for a terminal: the last days or the largest others, and one row for the rest."""
    if len(group) <= _MOST_ROWS:
        return list(group.items())
    ranked = sorted(group, reverse=True) if name == "by_day" else sorted(group, key=lambda k: -group[k])
    kept = set(ranked[:_MOST_ROWS])
    rest = [value for key, value in group.items() if key not in kept]
    label = f"{len(rest)} {'earlier' if name == 'by_day' else 'others'}"
    return [*((key, group[key]) for key in group if key in kept), (label, sum(rest))]


def _attempts(ledger: RunLedger) -> str:
    attempts = ledger.summary.attempts
    if not attempts:
        return "No attempt has begun yet."
    endless = "running" if ledger.state == "running" else "no recorded end"
    rows = []
    for each in attempts:
        attempt, held, gpus = each.attempt, ledger.split_of(each), ledger.gpus_of(each)
        rows.append(
            (
                str(attempt.attempt),
                attempt.cause.value if attempt.cause else endless,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.start)),
                format_duration(held.allocated / 1000),
                str(attempt.nodes),
                str(gpus),
                f"{attempt.first_step}-{attempt.last_step}" if attempt.first_step is not None else "none",
                str(each.num_lost),
                cell(attempt.last_committed_step),
                f"{(held * gpus).in_hours()['allocated']:.3f}",
            )
        )
    table = format_table(_HEADINGS, rows, right={0, 3, 4, 5, 7, 8, 9}, indent="  ")
    return "\n".join(["Attempts", table, *details_text([each.attempt for each in attempts])])


def details_text(attempts: Sequence[Attempt]) -> list[str]:
    """Return details beyond the cause, a wrapped paragraph for each attempt that has any."""
    return [wrap(f"#{each.attempt}: {each.detail}", "  ") for each in attempts if each.detail]


def _hours(ledger: RunLedger) -> str:
    own = sum(a.gpus * a.hours for a in ledger.own)
    node_hours = sum(a.nodes * a.hours for a in ledger.own)
    lines = ["GPU-hours", f"  {own:10,.3f}  by the run's own record ({node_hours:,.3f} node-hours)"]
    if ledger.source == "run":
        lines.append(_noted("-", f"by sacct: {ledger.note}"))
    else:
        count = sum(each.by_slurm for each in ledger.attempts)
        lines.append(f"  {ledger.gpu_hours:10,.3f}  by sacct -D, {count} allocation(s)")
        if ledger.note:
            lines.append(_noted("", ledger.note))
        unused = (
            f"{ledger.unused:.3f} of GPUs of its nodes that it did not ask for, " if ledger.unused else ""
        )
        why = f"difference: {unused}before and after its attempts"
        lines.append(_noted(f"{ledger.gpu_hours - own:+10,.3f}", why))
    if ledger.own and not any(a.gpus for a in ledger.own):
        lines.append(wrap("A CPU run: it held no GPU, so what it cost is its node-hours.", "  ", "  "))
    return "\n".join(lines)


def _noted(number: str, words: str) -> str:
    return wrap(words, f"  {number:>10}  ", " " * 14)


def _audit_text(audit: Audit) -> str:
    if not audit.num_steps:
        return "no ledger yet"
    if audit.exactly_once:
        return f"{audit.num_samples:,} samples in {audit.num_steps:,} steps, each exactly once"
    wrong = [
        (audit.missing_steps, "steps missing from the ledger"),
        (audit.repeated_samples, "samples consumed twice"),
        (audit.skipped_samples, "samples skipped"),
        (tuple((n, n) for n in audit.wrong_steps), "steps whose ranks read other samples"),
        (tuple((n, n) for n in audit.changed_steps), "steps that read other data when taken again"),
    ]
    return "NOT exactly once: " + "; ".join(
        f"{what}: {format_ranges(found)}" for found, what in wrong if found
    )


def _gpus(nodes: Sequence[dict[str, Any]]) -> list[str]:
    blocks = []
    rows = [_gpu_row(node, gpu) for node in nodes for gpu in node["gpus"].values() if gpu.get("ticks")]
    if rows:
        headings = ("node", "GPU", "util", "mean W", "max memory", "kWh", "hung", "notes")
        blocks.append(
            wrap("GPUs  (hung: share of readings at 100 % and under a quarter of the power limit)")
            + "\n"
            + format_table(headings, rows, right={1, 2, 3, 4, 5, 6}, indent="  ")
        )
    if any(node["source"] == "stub" for node in nodes):
        blocks.append("  These readings come from the stub library (source=stub): they mean nothing.")
    notes = {node["message"] for node in nodes if node["message"] and not node["gpus"]}
    if notes:
        blocks.append(wrap(f"GPUs  no readings: {'; '.join(sorted(notes))}"))
    return blocks


def _gpu_row(node: dict[str, Any], gpu: dict[str, Any]) -> tuple[str, ...]:
    memory, energy = gpu["max_memory_used_bytes"], gpu["energy_j"]
    errors = [f"{text} ({ticks}x)" for text, ticks in gpu["errors"].items()]
    if gpu["ecc_uncorrected_volatile"]:
        errors.append(f"{gpu['ecc_uncorrected_volatile']} uncorrected ECC")
    errors += [
        f"{reason} {share:.0%}"
        for reason, share in gpu["throttle_fraction"].items()
        if reason not in _HARMLESS and share >= 0.01
    ]
    return (
        str(node["node"]),
        cell(gpu["index"], "d"),
        cell(gpu["mean_gpu_utilization_percent"], ".0f", " %"),
        cell(gpu["mean_power_w"], ".0f"),
        "-" if memory is None else format_bytes(memory),
        "-" if energy is None else f"{energy / _JOULES_PER_KWH:.3f}",
        cell(gpu["busy_low_power_fraction"], ".0%"),
        ", ".join(errors) or "-",
    )
