"""Gather the facts of one attempt: its steps or parts, its ranks, and its GPUs during and after progress.

It reads at most `max_bytes` over all files together, the newest part of each, however long the attempt was
and on how many nodes. Of finished parts and rollout batches it reads only the times of their files.
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from r1hpc.base.records import mistake
from r1hpc.base.run_dir import RunDir
from r1hpc.config.stages import in_parts
from r1hpc.telemetry.diagnosis.summary import names_of
from r1hpc.telemetry.gpu.history import GpuFold
from r1hpc.telemetry.records.attempts import Attempt
from r1hpc.telemetry.records.lines import MetricEvent, Tail, gpu_line, read_plan, read_tail
from r1hpc.telemetry.records.metrics import Step, is_number, last_steps
from r1hpc.telemetry.records.ranks import RankTimes, finish_times, read_rank_times

_PROGRESS = ("save", "evaluation", "validation")
_SETTLE_S = 2.0
"""Utilisation covers up to the last second (nvml.h), so it shows a little later that work has ended."""


class GpuFacts:
    """One GPU: its readings while the attempt made progress, and after its last sign of it."""

    def __init__(self, node: str, uuid: str, static: dict[str, Any], period_s: float) -> None:
        self.node, self.uuid = node, uuid
        index = static.get("index")
        self.label = f"{node} GPU {uuid[:12] if index is None else index}"
        self.memory_total_bytes: int | None = static.get("memory_total_bytes")
        self.power_limit_w: float | None = static.get("power_limit_w")
        self._working, self._silent = GpuFold(), GpuFold()
        for fold in (self._working, self._silent):
            fold.start(static, period_s)
        self.errors: Counter[str] = Counter()
        """The driver's errors instead of readings, such as "gpu is lost", and how often."""
        self._ecc: list[int] = []

    def add(self, at: float, reading: dict[str, Any], begun: float, progress: float) -> None:
        if reading.get("error"):
            self.errors[str(reading["error"])] += 1
        if reading.get("ecc_uncorrected_volatile") is not None:
            self._ecc = [*self._ecc[:1], reading["ecc_uncorrected_volatile"]]
        if begun + _SETTLE_S <= at <= progress:
            self._working.add(at, reading)
        elif at > progress + _SETTLE_S:
            self._silent.add(at, reading)

    @cached_property
    def working(self) -> dict[str, Any]:
        """GpuFold.result() between the first and the last sign of progress; {} without a reading."""
        return self._working.result() if self._working.ticks else {}

    @cached_property
    def silent(self) -> dict[str, Any]:
        """The same after the last sign of progress."""
        return self._silent.result() if self._silent.ticks else {}

    @property
    def new_ecc_uncorrected(self) -> int:
        """Errors during the attempt."""
        return max(0, self._ecc[-1] - self._ecc[0]) if self._ecc else 0


@dataclass(frozen=True)
class Facts:
    """One attempt. Steps and GPUs are empty if nothing was recorded; a stage in parts takes no steps."""

    attempt: Attempt
    end: float
    """Time of its end; now, while it runs."""
    steps: tuple[Step, ...]
    last_progress: float
    """The last step, save, evaluation or finished piece of work; at first the attempt's begin."""
    gpus: tuple[GpuFacts, ...]
    ranks: RankTimes | None
    is_stub: bool
    is_partial: bool
    """Only the newest part of a long record was read."""
    parts: tuple[float, ...] | None = None
    """The finish times of its parts, the oldest first; None: its stage is not made in parts."""
    has_all_parts: bool = False
    """Only the stage's last work is left, which rank 0 does alone."""
    is_script: bool = False

    @property
    def silence_s(self) -> float:
        return max(0.0, self.end - self.last_progress)

    @property
    def median_step_s(self) -> float | None:
        times = self.values("step_time_s")
        return statistics.median(times) if times else None

    @property
    def mean_mfu(self) -> float | None:
        mfus = self.values("mfu")
        return statistics.fmean(mfus) if mfus else None

    def share(self, key: str) -> float | None:
        """Return the share of the step time that `key` (seconds) takes; None if it was not recorded."""
        pairs = [(s.value(key), s.step_time_s) for s in self.steps]
        known = [(part, whole) for part, whole in pairs if _is_known(part) and _is_known(whole)]
        total = sum(whole for _, whole in known if whole)
        return sum(part for part, _ in known) / total if total else None

    def values(self, key: str) -> list[float]:
        return [value for step in self.steps if _is_known(value := step.value(key))]

    def mean_gpu(self, key: str) -> float | None:
        """Return the mean over the GPUs of a number in GpuFacts.working."""
        values = [gpu.working[key] for gpu in self.gpus if gpu.working.get(key) is not None]
        return statistics.fmean(values) if values else None


def gather(run: RunDir, attempt: Attempt, *, end: float | None, max_bytes: int) -> Facts:
    """Read the facts. `end` None: unknown whether it still runs, so it counts until its last sign of life."""
    steps_budget, gpu_budget = max_bytes // 4, max_bytes // 2
    k = attempt.attempt
    newest = last_steps(run, count=steps_budget, tail_bytes=steps_budget)
    steps = tuple(step for step in newest if step.attempt == k)
    stage = names_of(run)[0]
    has_parts = in_parts(stage)
    pieces = finish_times(run.all_parts if has_parts else run.all_batches, attempt.start, end)
    events = read_tail(run.events, max_bytes // 16).records
    mine = [e for e in events if e.get("attempt") == k and e.get("event") in _PROGRESS]
    told = [float(event["time"]) for event in mine if mistake(event, MetricEvent) is None]
    progress = max([attempt.start, *(s.time for s in steps if s.time is not None), *told, *pieces])
    paths = run.all_gpu_metrics
    tails = [_sound(read_tail(path, gpu_budget // len(paths))) for path in paths]
    begun = attempt.start
    if steps and steps[0].time is not None:
        begun = steps[0].time - (steps[0].step_time_s or 0.0)
    gpus = [
        gpu for tail, path in zip(tails, paths, strict=True) for gpu in _gpus(tail, path, k, begun, progress)
    ]
    records = [record for tail in tails for record in tail.records]
    if end is None:
        ticks = (float(r["time"]) for r in records if r.get("attempt") == k and "time" in r)
        end = max(ticks, default=progress)
    planned = read_plan(run).get("num_steps")
    steps_size = run.train_metrics.stat().st_size if run.train_metrics.is_file() else 0
    return Facts(
        attempt=attempt,
        end=max(end, attempt.start),
        steps=steps,
        last_progress=progress,
        gpus=tuple(gpus),
        ranks=read_rank_times(run, k, max_bytes // 8),
        is_stub=any(record.get("source") == "stub" for record in records),
        is_partial=not all(tail.is_whole for tail in tails) or steps_size > steps_budget,
        parts=tuple(pieces) if has_parts else None,
        has_all_parts=has_parts and planned is not None and len(run.all_parts) >= planned,
        is_script=stage == "script",
    )


def _gpus(tail: Tail, path: Path, attempt: int, begun: float, progress: float) -> list[GpuFacts]:
    node = path.stem.removeprefix("gpu-")
    found: dict[str, GpuFacts] = {}
    # The attempt's header may come before the part that was read; the file begins with one of this node.
    statics, period_s = _statics(tail.first), _period(tail.first)
    for record in tail.records:
        if record.get("event") == "devices":
            statics |= _statics(record)
            period_s = _period(record)
        if record.get("attempt") != attempt or "time" not in record or "event" in record:
            continue
        for reading in record.get("gpus", ()):
            uuid = str(reading["uuid"])
            if uuid not in found:
                found[uuid] = GpuFacts(node, uuid, statics.get(uuid, {}), period_s)
            found[uuid].add(record["time"], reading, begun, progress)
    return list(found.values())


def _statics(record: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {str(gpu["uuid"]): gpu for gpu in (record or {}).get("gpus", ()) if "power_limit_w" in gpu}


def _period(record: dict[str, Any] | None) -> float:
    return float((record or {}).get("period_s") or 1.0)


def _sound(tail: Tail) -> Tail:
    first = tail.first if tail.first is not None and _is_sound(tail.first) else None
    return Tail(tuple(filter(_is_sound, tail.records)), first, tail.is_whole)


def _is_sound(record: dict[str, Any]) -> bool:
    return mistake(record, gpu_line(record)) is None


def _is_known(value: Any) -> bool:
    return is_number(value) and not math.isnan(value)
