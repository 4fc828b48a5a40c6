"""Format what the command `estimate` prints: hours, MFU, goodput, memory, assumptions."""

from collections.abc import Iterator

from r1hpc.base.tables import format_table, wrap
from r1hpc.base.units import amount, format_duration
from r1hpc.plan.hours.estimate import Estimate
from r1hpc.plan.hours.memory_options import MemoryOptions
from r1hpc.plan.hours.spread import Spread

_SHOWN_ASSUMPTIONS = (
    *("gpu", "num_gpus", "params", "active_params", "tokens", "sequences", "mean_completion_length"),
    *("max_completion_length", "seq_len", "precision", "recompute", "stack"),
    *("steps_measured", "step_time_s", "useful_part"),
)
_MOST_OPTIONS = 5
_HANGING = " " * 11


def estimate_text(found: Estimate) -> str:
    """Return everything worth reading, the hours first."""
    lines = [wrap(line, hanging=_HANGING) for line in _lines(found)]
    # A CPU run has no GPU for these, and the article's formula ignores the card.
    if found.gpu_hours is not None and found.method != "seed":
        if found.memory is not None:
            lines += _memory(found.memory)
        if found.baselines:
            parts = (f"{name} {amount(hours)}" for name, hours in found.baselines.items())
            lines.append(wrap(f"baselines  {', '.join(parts)}", hanging=_HANGING))
    lines += [wrap(f"note       {note}", hanging=_HANGING) for note in found.notes]
    return "\n".join(lines)


def hours_text(hours: Spread) -> str:
    """Format hours as `230 (150 to 340)`: P50, P10 and P90."""
    return f"{amount(hours.p50)} ({amount(hours.p10)} to {amount(hours.p90)})"


def summary_line(found: Estimate) -> str:
    """Return the hours, and the wall time if the number of GPUs is known, in one line."""
    hours, what = found.gpu_hours or found.node_hours, "GPU-hours" if found.gpu_hours else "node-hours"
    if hours is None:
        return "not known"
    wall = next(iter(found.wall_hours.values()), None)
    if wall is None or len(found.wall_hours) > 1:
        return hours.text(what)
    return f"{hours.text(what)}; {format_duration(wall.p50 * 3600)} of wall time"


def _lines(found: Estimate) -> Iterator[str]:
    yield f"estimate   {summary_line(found)}"
    if found.ideal_gpu_hours:
        yield f"ideal      {hours_text(found.ideal_gpu_hours)} GPU-hours if nothing went wrong"
    for gpus, wall in found.wall_hours.items():
        p10, p50, p90 = (format_duration(3600 * hours) for hours in (wall.p10, wall.p50, wall.p90))
        yield f"wall       {p50} on {gpus} GPU{'s' if gpus > 1 else ''} ({p10} to {p90})"
    if mfu := found.mfu:
        yield f"MFU        {mfu.p50:.1%} expected in a step, between {mfu.p10:.1%} and {mfu.p90:.1%}"
    if flops := found.flops:
        yield (
            f"FLOPs      {flops['total']:.3g} (full square of attention), {flops['total_causal']:.3g} "
            f"(causal), {flops['hardware']:.3g} with recomputation"
        )
    if lost := found.goodput:
        warned = round(lost.interruptions_per_day - 86400 / lost.mtbf_s, 6)
        preempted = f" and {warned:g} preemptions a day" if warned > 0 else ""
        yield (
            f"goodput    {lost.goodput:.1%}; a failure every {format_duration(lost.mtbf_s)}{preempted}; "
            f"save every {format_duration(lost.optimal_interval_s)} (Daly)"
        )
    if found.phases:
        total = sum(found.phases.values())
        parts = (f"{name} {hours / total:.0%}" for name, hours in found.phases.items() if hours > 0)
        yield f"phases     {', '.join(parts)}"
    if found.drivers:
        parts = (f"{name} {part:.0%}" for name, part in found.drivers.items())
        yield f"width      {', '.join(parts)}"
    assumed = found.assumptions
    shown = {name: assumed[name] for name in _SHOWN_ASSUMPTIONS if assumed.get(name) is not None}
    if shown.get("active_params") == shown.get("params"):
        shown.pop("active_params", None)
    if shown:
        parts = (f"{name} {_value(value)}" for name, value in shown.items())
        yield f"assumed    {', '.join(parts)}"


def _value(value: object) -> str:
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return amount(value) if isinstance(value, float) else str(value)


def _memory(options: MemoryOptions) -> Iterator[str]:
    cards = "the GPU" if options.num_gpus == 1 else f"each of {options.num_gpus} GPUs"
    yield f"memory     {options.usable_gib:.0f} GiB usable on {cards}"
    if not options.fits:
        yield f"           nothing fits; the leanest: {options.smallest}"
        return
    rows = [
        (
            str(o.zero_stage),
            str(o.micro_batch_size),
            o.recompute,
            "yes" if o.offload else "no",
            f"{o.memory.states_gib:.1f}",
            f"{o.memory.activations_gib + o.memory.logits_gib:.1f}",
            f"{o.total_gib:.1f}",
            f"{o.expected_mfu:.1%}",
        )
        for o in options.fits[:_MOST_OPTIONS]
    ]
    heads = ("ZeRO", "micro", "recompute", "offload", "states", "activations", "GiB", "MFU")
    yield format_table(heads, rows, right={0, 1, 4, 5, 6}, indent=_HANGING)
