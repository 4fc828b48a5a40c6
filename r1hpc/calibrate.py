"""How good were the estimates, and what does this site make of the next one?

    python -m r1hpc.calibrate                    # all finished runs under ./runs or $R1HPC_RUN_ROOT
    python -m r1hpc.calibrate --run-root DIR --json

Each finished run is set beside its estimate and beside that estimate corrected by the runs before
it. From five runs on the site's own ratios replace the published prior; `estimate` and `submit`
apply them by themselves. Hours are GPU-hours, for CPU runs node-hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import add_run_root
from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import default_run_root
from r1hpc.base.tables import format_table, wrap

if TYPE_CHECKING:  # at run time what only an answer needs is imported for it: --help must be quick
    from r1hpc.accounting.calibrate import Site
    from r1hpc.accounting.correction import Scored

_HEADINGS = ("run", "estimate", "actual", "by", "ratio", "corrected", "error", "then")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.calibrate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_run_root(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.accounting.calibrate import finished_runs

    root = Path(arguments.run_root) if arguments.run_root else default_run_root()
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {root.absolute()}: say where runs lie with --run-root DIR or R1HPC_RUN_ROOT"
        )
    site = finished_runs(root)
    if arguments.json:
        print_json({"resources": {name: _as_json(site, name) for name in site.resources}, **_rest(site)})
    else:
        print("\n\n".join([*(_as_text(site, name) for name in site.resources), _left_out(site)]))
    return 0


def _as_json(site: Site, resource: str) -> dict[str, Any]:
    from r1hpc.accounting.correction import correction, effect, score

    scored = score(site.of(resource))
    shown = effect(scored)
    return {
        "unit": _unit(resource),
        "correction": correction(resource, site.of(resource)).to_json(),
        "effect": None if shown is None else asdict(shown),
        "runs": [each.to_json() for each in scored],
    }


def _rest(site: Site) -> dict[str, Any]:
    return {"num_runs": len(site.runs), "left_out": dict(site.left_out)}


def _as_text(site: Site, resource: str) -> str:
    from r1hpc.accounting.correction import correction, score

    scored = score(site.of(resource))
    now = correction(resource, site.of(resource))
    table = format_table(_HEADINGS, [_row(each) for each in scored], right={1, 2, 4, 5, 6, 7}, indent="  ")
    return "\n".join(
        [
            f"{resource} ({_unit(resource)})",
            table,
            wrap(f"Next estimate: {now.basis}.", "  ", "  "),
            *_effect(scored),
        ]
    )


def _row(each: Scored) -> tuple[str, ...]:
    return (
        each.run.run_id,
        f"{each.run.estimate.p50:.4g}",
        f"{each.run.actual:.4g}",
        each.run.source,
        f"{each.ratio:.2f}",
        f"{each.corrected.p50:.4g}" if each.num_before else "-",
        f"{each.error_before:.0%}",
        f"{each.error_after:.0%}" if each.num_before else "-",
    )


def _effect(scored: Sequence[Scored]) -> list[str]:
    from r1hpc.accounting.correction import effect

    shown = effect(scored)
    if shown is None:
        return []
    before, after, num = shown.before, shown.after, shown.num_runs
    runs = "1 run" if num == 1 else f"{num} runs"
    text = (
        f"Over the {runs} with one before: as estimated, a median error of {before.median_error:.0%}, "
        f"P90/P10 {before.median_width:.1f}, {before.num_inside} of {num} inside; corrected by those before, "
        f"{after.median_error:.0%}, P90/P10 {after.median_width:.1f}, {after.num_inside} of {num} inside."
    )
    return [wrap(text, "  ", "  ")]


def _left_out(site: Site) -> str:
    if not site.left_out:
        num = len(site.runs)
        return f"{num} finished run{'s' * (num != 1)}, none left out"
    reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(site.left_out.items()))
    return wrap(f"Left out: {reasons}.")


def _unit(resource: str) -> str:
    from r1hpc.accounting.correction import CPU

    return "node-hours" if resource == CPU else "GPU-hours"


if __name__ == "__main__":
    run_command(main)
