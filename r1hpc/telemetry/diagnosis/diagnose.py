"""Diagnose an attempt from its steps, ranks, GPUs and rewards, in sentences with numbers.

evidence.py reads the records; rules.py and rl_health.py judge them. It needs neither NVML nor Slurm: it reads
at most `max_bytes` of the run folder.
"""

from dataclasses import dataclass

from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import wrap
from r1hpc.base.units import format_duration
from r1hpc.telemetry.diagnosis.evidence import gather
from r1hpc.telemetry.diagnosis.rl_health import health_warnings, held_out_warnings
from r1hpc.telemetry.diagnosis.rules import RULES, Finding
from r1hpc.telemetry.records.attempts import Attempt
from r1hpc.telemetry.records.evaluations import read_evaluations

QUICK_BYTES = 8 * 2**20
"""Read in 0.51 s of CPU, whatever precedes it (`benchmarks/diagnose.py`, 115 MiB)."""
THOROUGH_BYTES = 64 * 2**20
_MOST_OF_A_KIND = 3
"""A hot rack is one finding, not eighty."""


@dataclass(frozen=True)
class Diagnosis:
    run_id: str
    attempt: int
    figures: dict[str, float | int | None]
    """num_steps, num_parts (None if its stage takes steps), median_step_s, data_share, mfu,
    gpu_utilization_percent, gpu_power_w, silence_s."""
    findings: tuple[Finding, ...]
    source: str
    """The library of the GPU readings: nvml, or stub, whose readings mean nothing."""
    is_partial: bool


def diagnose(
    run: RunDir, attempt: Attempt, *, end: float | None, max_bytes: int = THOROUGH_BYTES
) -> Diagnosis:
    """Diagnose an attempt from the newest `max_bytes` of all its files together.

    `end` is when it ended, or now while it runs; None: unknown, so it counts until its last sign of life.
    """
    facts = gather(run, attempt, end=end, max_bytes=max_bytes)
    findings = [finding for rule in RULES for finding in rule(facts)]
    findings += health_warnings(facts.steps)
    findings += held_out_warnings(read_evaluations(run))
    return Diagnosis(
        run_id=run.run_id,
        attempt=attempt.attempt,
        figures={
            "num_steps": len(facts.steps),
            "num_parts": None if facts.parts is None else len(facts.parts),
            "median_step_s": facts.median_step_s,
            "data_share": facts.share("data_time_s"),
            "mfu": facts.mean_mfu,
            "gpu_utilization_percent": facts.mean_gpu("mean_gpu_utilization_percent"),
            "gpu_power_w": facts.mean_gpu("mean_power_w"),
            "silence_s": facts.silence_s,
        },
        findings=tuple(findings),
        source="stub" if facts.is_stub else "nvml",
        is_partial=facts.is_partial,
    )


def as_lines(diagnosis: Diagnosis) -> list[str]:
    """Return lines for a log: one of figures, then two for each finding, at most 100 columns wide."""
    lines = [wrap(f"attempt {diagnosis.attempt}: {_summary(diagnosis)}")]
    seen: dict[str, int] = {}
    for finding in diagnosis.findings:
        seen[finding.code] = seen.get(finding.code, 0) + 1
        if seen[finding.code] <= _MOST_OF_A_KIND:
            lines.append(wrap(f"{finding.severity.value}: {finding.code}: {finding.sentence}", "  ", "    "))
            lines.append(wrap(f"try: {finding.advice}", "    ", "    "))
    for code, count in seen.items():
        if count > _MOST_OF_A_KIND:
            lines.append(f"  and {count - _MOST_OF_A_KIND} more of {code} (--json lists all)")
    if diagnosis.source == "stub":
        lines.append("  The GPU readings come from the stub library (source=stub): they mean nothing.")
    return lines


def _summary(diagnosis: Diagnosis) -> str:
    known = {key: value for key, value in diagnosis.figures.items() if value is not None}
    unit = "part" if "num_parts" in known else "step"
    if not (count := known[f"num_{unit}s"]):
        parts = [f"no {unit} in {format_duration(known['silence_s'])}"]
    elif unit == "part":
        parts = [f"{count} part{'s' * (count != 1)} made"]
    else:
        more = " at least" if diagnosis.is_partial else ""
        parts = [f"{count} steps{more}"]
    forms = (
        ("median_step_s", "{:,.4g} s each (median)"),
        ("data_share", "{:.0%} of it waiting for data"),
        ("mfu", "MFU {:.1%}"),
        ("gpu_utilization_percent", "GPUs {:.0f} % busy"),
        ("gpu_power_w", "at {:.0f} W"),
    )
    parts += [form.format(known[key]) for key, form in forms if key in known]
    if not diagnosis.findings:
        parts.append("nothing stands out")
    return ", ".join(parts)
