"""Judge the facts of an attempt (evidence.py): one pure function for each problem, which yields its findings.

diagnose.py applies them, after the attempt or while it runs. A rule without the facts it needs gives no
finding. Thresholds without a source are our own choice, with the reason beside them; none was tuned on a
fleet.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from r1hpc.base.units import format_bytes, format_duration
from r1hpc.telemetry.diagnosis.evidence import Facts, GpuFacts
from r1hpc.telemetry.records.attempts import Cause

MIN_STEPS = 10
"""Before that, warm-up and compilation dominate."""

HANG_AFTER_S = 60.0
HANG_AFTER_STEPS = 10
"""Silence must be longer than both, since steps vary."""
HANG_AT_START_S = 600.0
"""Before the first step ranks wait for good reasons: loading, converting a checkpoint."""
HANG_AFTER_PARTS = 3
"""For a stage in parts: silence must also exceed this many times the longest part. Most answers of one part
may run to max_completion_length although those of earlier parts did not."""
HANG_TICK_SHARE = 0.9
"""Share of the readings since then, busy at low power: 100 % at under a quarter of the power limit. Seen: 44
of 250 W on V100 (NVIDIA/nccl#199), about 70 of 400 W on A100 (NVIDIA/nccl#968); a kernel that spins in a
collective keeps a GPU "utilised" and does no arithmetic."""

DATA_SHARE = 0.15
"""Share of the step time spent waiting for data. The loader takes 1 % of the smoke job's: no noise."""
INPUT_BOUND_UTILIZATION = 90
"""Percent. Above this, the wait for data overlaps work of the GPU."""

BUSY_UTILIZATION = 90
"""Percent: nearly always a kernel is running."""
LOW_MFU = 0.2
"""Nine in ten of 30 published A100 runs reach 0.236 over the full run, restarts included: steps that stay
below 0.2 are waiting for something."""
MID_POWER = (0.25, 0.7)
"""Shares of the power limit. Below is a hang; matrix products at full speed draw nearly all of it."""

STRAGGLER_RATIO = 1.2
"""A rank's own work against the median rank. NVIDIA's resiliency extension compares with the fastest one,
which one lucky rank can move."""
STRAGGLER_PERSISTENCE = 0.7
"""Share of the records. A garbage collection or a neighbour's job sometimes slows a rank down."""
STRAGGLER_MIN_RECORDS = 3

THROTTLE_SHARE = 0.05
"""Share of the readings. Heat or power-brake slowdown is a defect; one reading may be a spike at start-up."""
THROTTLE_REASONS = (
    "hw_slowdown",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "board_limit",
    "reliability",
)
"""Without sw_power_cap, which keeps a card at full load within its limit, and gpu_idle."""

MEMORY_SHARE = 0.5
"""Share of the card at the peak: below it, the micro batch can be doubled if activations matter."""

IDLE_UTILIZATION, OTHERS_UTILIZATION = 5, 50
"""Percent: an idle GPU beside working ones."""

ROLLOUT_SHARE = 0.5
"""Share of the step. Rollouts take 57 to 72 % of RL steps where measured (huggingface/trl, volcengine/verl),
so only low utilisation beside it is a finding."""
ROLLOUT_UTILIZATION = 60
REWARD_SHARE = 0.2
"""Share of the step spent on verifying answers, while the GPUs wait."""


class Severity(StrEnum):
    error = "error"
    """The run makes no progress, or its numbers are in doubt."""
    warning = "warning"
    """Hours are being lost, or the training goes wrong."""
    info = "info"
    """It could cost less."""


@dataclass(frozen=True)
class Finding:
    code: str
    """A stable name for scripts, such as input_bound."""
    severity: Severity
    sentence: str
    advice: str


def error(code: str, sentence: str, advice: str) -> Finding:
    return Finding(code, Severity.error, sentence, advice)


def warning(code: str, sentence: str, advice: str) -> Finding:
    return Finding(code, Severity.warning, sentence, advice)


Rule = Callable[[Facts], Iterable[Finding]]


def hang(facts: Facts) -> Iterable[Finding]:
    """Find busy GPUs at idle power, without steps or parts."""
    ended_as_hang = facts.attempt.cause is Cause.hang
    got_through = facts.attempt.cause in (Cause.finished, Cause.stopped)
    if got_through or (not ended_as_hang and facts.silence_s < _longest_silence_s(facts)):
        return
    silent = [gpu for gpu in facts.gpus if gpu.silent.get("busy_low_power_fraction") is not None]
    spinning = [gpu for gpu in silent if gpu.silent["busy_low_power_fraction"] >= HANG_TICK_SHARE]
    if not spinning and not ended_as_hang:
        return
    unit, since = "step" if facts.parts is None else "part", "since the attempt began"
    if facts.steps:
        since = f"after step {facts.steps[-1].global_step}"
    if facts.parts:
        since = f"after the last of {len(facts.parts)}"
    sentence = f"no {unit} for {format_duration(facts.silence_s)} {since}"
    if spinning:
        power = statistics.fmean(gpu.silent["mean_power_w"] for gpu in spinning)
        limit = statistics.fmean(gpu.power_limit_w or 0.0 for gpu in spinning)
        is_all = len(spinning) == len(facts.gpus)
        who = f"all {len(facts.gpus)}" if is_all else f"{len(spinning)} of {len(facts.gpus)}"
        sentence += (
            f", while {who} GPUs read 100 % busy at {power:.0f} W of {limit:.0f} W: "
            "they spin in a collective that never completes"
        )
    others = [gpu for gpu in silent if gpu not in spinning]
    odd = (
        f" Look first at {_names(others)}, which did not wait with the others." if spinning and others else ""
    )
    advice = (
        "read the stacks in the rank logs: one rank is missing from a collective, has died, or has lost its "
        f"network.{odd}"
    )
    if ended_as_hang and facts.is_script and not facts.steps:  # its output is the only sign of life
        advice = (
            "rank 0 printed nothing for train.hang_timeout_s: let it print more often, or raise that. If it "
            "hung, the stacks are in the rank logs"
        )
    yield error("hang", sentence, advice)


def input_bound(facts: Facts) -> Iterable[Finding]:
    """Find steps that wait for their data while the GPUs are idle."""
    share, utilization = facts.share("data_time_s"), facts.mean_gpu("mean_gpu_utilization_percent")
    if len(facts.steps) < MIN_STEPS or share is None or share < DATA_SHARE:
        return
    if utilization is not None and utilization >= INPUT_BOUND_UTILIZATION:
        return
    idle = "" if utilization is None else f", and the GPUs are busy only {utilization:.0f} % of the time"
    yield warning(
        "input_bound",
        f"{share:.0%} of each step is spent waiting for data{idle}: the input is too slow",
        "put the dataset on a faster file system or on node-local scratch, make its shards larger, or give "
        "each rank more CPU cores (resources.cpus_per_task)",
    )


def communication_bound(facts: Facts) -> Iterable[Finding]:
    """Find GPUs whose kernels always run but do little arithmetic: they move or await data."""
    utilization, mfu = facts.mean_gpu("mean_gpu_utilization_percent"), facts.mean_mfu
    powers = [
        gpu.working["mean_power_w"] / gpu.power_limit_w
        for gpu in facts.gpus
        if gpu.power_limit_w and gpu.working.get("mean_power_w") is not None
    ]
    if len(facts.steps) < MIN_STEPS or len(facts.gpus) < 2:
        return
    if utilization is None or not powers or mfu is None:
        return
    power = statistics.fmean(powers)
    if utilization < BUSY_UTILIZATION or mfu >= LOW_MFU or not MID_POWER[0] <= power <= MID_POWER[1]:
        return
    yield warning(
        "communication_bound",
        f"the GPUs read {utilization:.0f} % busy, but at {power:.0%} of their power limit and with an MFU of "
        f"{mfu:.1%}: most of that time they move data or wait for other GPUs",
        "raise train.gradient_accumulation_steps or train.micro_batch_size, lower deepspeed.zero_stage, use "
        "fewer nodes, and check with the interconnect's counters that NCCL uses it (NCCL_DEBUG=INFO). Very "
        "small models look the same from launching kernels",
    )


def straggler(facts: Facts) -> Iterable[Finding]:
    """Find a rank, or all ranks of a node, that works longer while the others wait."""
    ranks = facts.ranks
    if ranks is None or len(ranks.step_time_s) < STRAGGLER_MIN_RECORDS or len(ranks.step_time_s[0]) < 2:
        return
    busy = ranks.busy_s
    medians = [statistics.median(row) for row in busy]
    nodes, num_ranks = ranks.nodes, len(busy[0])
    if len(nodes) != num_ranks:  # unrecorded: ranks fill one node after another, as srun places them
        names = facts.attempt.node_names or ("an unknown node",)
        nodes = tuple(names[rank * len(names) // num_ranks] for rank in range(num_ranks))
    slow: dict[str, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        late = sum(row[rank] >= STRAGGLER_RATIO * middle for row, middle in zip(busy, medians, strict=True))
        if late >= STRAGGLER_PERSISTENCE * len(busy):
            slow[node].append(rank)
    for node, members in slow.items():
        own = statistics.fmean(statistics.fmean(row[rank] for rank in members) for row in busy)
        middle = statistics.fmean(medians)
        step = statistics.fmean(statistics.fmean(row) for row in ranks.step_time_s)
        whole = len(members) == nodes.count(node) > 1
        who = f"all ranks of {node}" if whole else f"rank {', '.join(map(str, members))} on {node}"
        yield warning(
            "straggler",
            f"{who}: {own:.3g} s of own work a step where the median rank needs {middle:.3g} s "
            f"({own / middle:.2f} times as long); the others wait, {(own - middle) / step:.0%} of the time",
            f"compare clocks, temperature and other processes on {node}; if it stays slow, leave it out: "
            f"--exclude {node}",
        )


def throttled(facts: Facts) -> Iterable[Finding]:
    """Find GPUs that slow down because of heat, a power brake or a fault."""
    for gpu in facts.gpus:
        shares: dict[str, float] = gpu.working.get("throttle_fraction", {})
        bad = {r: share for r, share in shares.items() if r in THROTTLE_REASONS and share >= THROTTLE_SHARE}
        if not bad:
            continue
        words = ", ".join(f"{reason} {share:.0%} of the time" for reason, share in bad.items())
        hottest = gpu.working.get("max_temperature_c")
        heat = "" if hottest is None else f", at up to {hottest} C"
        yield warning(
            "throttled",
            f"{gpu.label} is slowed down: {words}{heat}; in synchronous training it slows all others too",
            f"tell the site's staff (cooling or power of {gpu.node}), leave it out: --exclude {gpu.node}",
        )


def memory_headroom(facts: Facts) -> Iterable[Finding]:
    """Find cards that are half empty at the peak."""
    peaks = [
        (gpu.working["max_memory_used_bytes"] / gpu.memory_total_bytes, gpu)
        for gpu in facts.gpus
        if gpu.memory_total_bytes and gpu.working.get("max_memory_used_bytes")
    ]
    if not peaks or (len(facts.steps) < MIN_STEPS and not facts.parts):
        return
    share, gpu = max(peaks, key=lambda pair: pair[0])
    if share >= MEMORY_SHARE:
        return
    assert gpu.memory_total_bytes, "chosen above"
    used = format_bytes(share * gpu.memory_total_bytes)
    fuller = "more prompts decoded together (generate.items_per_part, rollout.prompts_per_batch)"
    if facts.parts is None:
        fuller = (
            "a larger train.micro_batch_size with fewer accumulated batches, no "
            "model.activation_checkpointing, a lower deepspeed.zero_stage"
        )
    yield Finding(
        "memory_headroom",
        Severity.info,
        f"the fullest GPU ({gpu.label}) fills {used} of {format_bytes(gpu.memory_total_bytes)}, {share:.0%}",
        f"{fuller}, or fewer GPUs would use the hours you pay for",
    )


def idle_gpu(facts: Facts) -> Iterable[Finding]:
    """Find a requested GPU that is idle."""
    known = [g for g in facts.gpus if g.working.get("mean_gpu_utilization_percent") is not None]
    idle = [g for g in known if g.working["mean_gpu_utilization_percent"] < IDLE_UTILIZATION]
    busiest = max((g.working["mean_gpu_utilization_percent"] for g in known), default=0.0)
    if not idle or busiest < OTHERS_UTILIZATION:
        return
    yield warning(
        "idle_gpu",
        f"{_names(idle)} did nothing, while the busiest GPU was busy {busiest:.0f} % of the time",
        "ask for as many GPUs as there are ranks (resources.gpus_per_node), and look whether another job's "
        "GPUs are visible here",
    )


def rollout_idle(facts: Facts) -> Iterable[Finding]:
    """Find RL whose GPUs are idle while completions are decoded."""
    share, utilization = facts.share("rollout_time_s"), facts.mean_gpu("mean_gpu_utilization_percent")
    if len(facts.steps) < MIN_STEPS or share is None or utilization is None:
        return
    if share < ROLLOUT_SHARE or utilization >= ROLLOUT_UTILIZATION:
        return
    yield warning(
        "rollout_idle",
        f"{share:.0%} of each step goes into rollouts, and the GPUs are busy {utilization:.0f} % of the "
        "time: decoding leaves them idle",
        "decode more prompts together (rollout.prompts_per_batch), cut the longest completions "
        "(rollout.max_completion_length), or use rollout.engine=vllm",
    )


def reward_bound(facts: Facts) -> Iterable[Finding]:
    """Find RL that waits for its verifiers, which run on the CPU."""
    share = facts.share("reward_time_s")
    if len(facts.steps) < MIN_STEPS or share is None or share < REWARD_SHARE:
        return
    yield warning(
        "reward_bound",
        f"{share:.0%} of each step is spent on verifying answers, and no GPU works meanwhile",
        "lower reward.timeout_s, give each rank more CPU cores (resources.cpus_per_task), or take a cheaper "
        "verifier",
    )


def hardware(facts: Facts) -> Iterable[Finding]:
    """Find uncorrectable memory errors, and GPUs that no longer answer."""
    for gpu in facts.gpus:
        advice = f"report {gpu.uuid} of {gpu.node} to the site's staff, leave it out: --exclude {gpu.node}"
        if gpu.new_ecc_uncorrected:
            errors = f"{gpu.new_ecc_uncorrected} memory error{'s' if gpu.new_ecc_uncorrected > 1 else ''}"
            sentence = f"{gpu.label} had {errors} that ECC could not correct during this attempt"
            yield error("ecc", sentence, advice)
        if gpu.errors:
            words = ", ".join(f"{text} ({ticks} readings)" for text, ticks in gpu.errors.items())
            yield error("gpu_lost", f"{gpu.label} stopped answering: {words}", advice)
    detail = facts.attempt.detail
    if any(word in detail.lower() for word in ("uncorrectable ecc", "xid", "unspecified launch failure")):
        yield error(
            "xid",
            f"a rank ended on a GPU fault: {detail}",
            f"have the site's staff look for Xid in the kernel log of {', '.join(facts.attempt.node_names)}; "
            "leave the node out with --exclude meanwhile",
        )


RULES: tuple[Rule, ...] = (
    hang,
    hardware,
    straggler,
    throttled,
    input_bound,
    communication_bound,
    rollout_idle,
    reward_bound,
    idle_gpu,
    memory_headroom,
)


def _longest_silence_s(facts: Facts) -> float:
    if facts.parts is not None:
        # Only a finished part shows how long parts take; decoding a small model looks like spinning, as do
        # ranks that wait for rank 0 to sum up. The watchdog, which sees every batch, ends real hangs.
        waits = [after - before for before, after in pairwise((facts.attempt.start, *facts.parts))]
        part_s = math.inf if facts.has_all_parts else max(waits, default=0.0) or math.inf
        return max(HANG_AT_START_S, HANG_AFTER_PARTS * part_s)
    if not facts.steps:
        return HANG_AT_START_S
    return max(HANG_AFTER_S, HANG_AFTER_STEPS * (facts.median_step_s or 0.0))


def _names(gpus: Sequence[GpuFacts], most: int = 4) -> str:
    more = f" and {len(gpus) - most} more" if len(gpus) > most else ""
    return ", ".join(gpu.label for gpu in gpus[:most]) + more
