"""Finished runs beside their estimates, as JSON and for a terminal: what the command `calibrate` prints.

print(site_text(finished_runs(run_root)))
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from r1hpc.accounting.calibrate import Site
from r1hpc.accounting.correction import CPU, Correction, Scored, correction, effect, score
from r1hpc.base.tables import format_table, wrap

_HEADINGS = ("run", "stage", "estimate", "actual", "by", "useful", "ratio", "corrected", "error", "then")


def site_json(site: Site) -> dict[str, Any]:
    """By resource: its runs, the effect of the corrections so far, and the next one."""
    resources = {name: _as_json(site, name) for name in site.resources}
    return {"resources": resources, "num_runs": len(site.runs), "left_out": dict(site.left_out)}


def site_text(site: Site) -> str:
    """A table for each resource."""
    return "\n\n".join([*(_as_text(site, name) for name in site.resources), _left_out(site)])


def _as_json(site: Site, resource: str) -> dict[str, Any]:
    scored = score(site.of(resource))
    shown = effect(scored)
    return {
        "unit": _unit(resource),
        "correction": _next(site, resource).to_json(),
        "effect": None if shown is None else asdict(shown),
        "runs": [each.to_json() for each in scored],
    }


def _next(site: Site, resource: str) -> Correction:
    """For a run like the last one."""
    runs = site.of(resource)
    return correction(runs[-1].planned, runs)


def _as_text(site: Site, resource: str) -> str:
    scored = score(site.of(resource))
    table = format_table(_HEADINGS, [_row(each) for each in scored], right={2, 3, *range(5, 10)}, indent="  ")
    return "\n".join(
        [
            f"{resource} ({_unit(resource)})",
            table,
            wrap(f"Next estimate: {_next(site, resource).basis}.", "  ", "  "),
            *_effect(scored),
        ]
    )


def _row(each: Scored) -> tuple[str, ...]:
    return (
        each.run.run_id,
        each.run.stage,
        f"{each.run.estimate.p50:.4g}",
        f"{each.run.hours:.4g}",
        each.run.source,
        f"{each.run.useful_share:.0%}",
        f"{each.ratio:.2f}",
        f"{each.corrected.p50:.4g}" if each.num_before else "-",
        f"{each.error_before:.0%}",
        f"{each.error_after:.0%}" if each.num_before else "-",
    )


def _effect(scored: Sequence[Scored]) -> list[str]:
    shown = effect(scored)
    if shown is None:
        return []
    before, after, num = shown.before, shown.after, shown.num_runs
    runs = "1 run" if num == 1 else f"{num} runs"
    text = (
        f"Over the {runs} with one like it before: as estimated, a median error of "
        f"{before.median_error:.0%}, P90/P10 {before.median_width:.1f}, {before.num_inside} of {num} inside; "
        f"corrected by those before, {after.median_error:.0%}, P90/P10 {after.median_width:.1f}, "
        f"{after.num_inside} of {num} inside."
    )
    return [wrap(text, "  ", "  ")]


def _left_out(site: Site) -> str:
    if not site.left_out:
        num = len(site.runs)
        return f"{num} finished run{'s' * (num != 1)}, none left out"
    reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(site.left_out.items()))
    return wrap(f"Left out: {reasons}.")


def _unit(resource: str) -> str:
    return "node-hours" if resource == CPU else "GPU-hours"
