"""Attempts as they would be recorded, for the rules of diagnose: steps or parts, readings of GPUs, silence.

scene = Scene(tmp_path); scene.steps(); scene.gpus({}); scene.end("preempted")      # -> Diagnosis
"""

import json
from pathlib import Path
from typing import Any

from r1hpc.base.files import iter_records
from r1hpc.base.records import mistake
from r1hpc.telemetry.diagnosis.diagnose import QUICK_BYTES, Diagnosis, diagnose
from r1hpc.telemetry.diagnosis.rules import Finding
from r1hpc.telemetry.gpu.history import GpuHistory
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.lines import gpu_line
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.ranks import RankTimeWriter
from tests.recorded import RecordedRun

CARD = 80 * 2**30
GOOD = {
    "gpu_utilization_percent": 97,
    "power_w": 360.0,
    "memory_used_bytes": 60 * 2**30,
    "temperature_c": 61,
    "ecc_uncorrected_volatile": 0,
    "throttle_reasons": ["sw_power_cap"],
}


def summarise(path: Path) -> dict[str, Any]:
    """The readings of a node folded at once, without the folds kept beside them."""
    summary = GpuHistory("n1")
    for record in iter_records(path):
        if mistake(record, gpu_line(record)) is None:
            summary.add(record)
    return summary.result()


class Scene:
    """An attempt on two nodes of two GPUs: first steps of one second, then perhaps silence."""

    def __init__(self, path: Path, num_gpus: int = 2, stage: str = "pretrain") -> None:
        self.made = RecordedRun(path / "run", gpus=2 * num_gpus, nodes=2, stage=stage)
        self.made.submit("4711", "slurm")
        self.made.begin()
        self.num_gpus = num_gpus
        self.start = self.made.clock

    def steps(self, count: int = 30, step_time_s: float = 1.0, mfu: float | None = 0.4, **more: Any) -> None:
        writer = MetricWriter(self.made.run, self.made.attempts)
        self.made.clock += 10
        fields = {"data_time_s": 0.01, **more}
        for step in range(1, count + 1):
            self.made.clock += step_time_s
            times = {"time": self.made.clock, "step_time_s": step_time_s}
            writer.step(global_step=step, loss=2.0, mfu=mfu, **times, **fields)

    def silence(self, seconds: float) -> None:
        self.made.clock += seconds

    def gpus(
        self,
        during: dict[str, Any],
        after: dict[str, Any] | None = None,
        *,
        odd: dict[str, Any] | None = None,
    ) -> None:
        """A tick a second on each GPU; `odd` is what GPU 1 of n2 reads besides, all the time."""
        working_until = self.start + 10 + 30
        for node in ("n1", "n2"):
            uuids = [f"GPU-{node}-{i}" for i in range(self.num_gpus)]
            static = [
                {"uuid": u, "index": i, "name": "A100", "memory_total_bytes": CARD, "power_limit_w": 400.0}
                for i, u in enumerate(uuids)
            ]
            stamp = {"node": node, "attempt": 1, "source": "nvml"}
            lines: list[dict[str, Any]] = [
                {
                    "event": "devices",
                    "time": self.start,
                    "period_s": 1.0,
                    "driver": "550",
                    "gpus": static,
                    **stamp,
                }
            ]
            at = self.start
            while at <= self.made.clock:
                reading = GOOD | (during if at <= working_until or after is None else after)
                strange = {**reading, **(odd or {})}
                gpus = [{"uuid": u, **(strange if u == "GPU-n2-1" else reading)} for u in uuids]
                lines.append({"time": at, **stamp, "gpus": gpus})
                at += 1
            self.made.run.gpu_metrics(node).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ranks(self, busy_s: list[list[float]], step_time_s: float = 1.0) -> None:
        writer = RankTimeWriter(self.made.run, 1, ["n1", "n1", "n2", "n2"])
        for i, row in enumerate(busy_s):
            waits = [step_time_s - busy for busy in row]
            writer.write(global_step=i + 1, num_steps=1, step_time_s=[step_time_s] * len(row), wait_s=waits)

    def end(self, cause: str = "preempted", detail: str = "") -> Diagnosis:
        self.made.end(cause, detail=detail)
        attempt = read_history(self.made.run).attempts[-1]
        return diagnose(self.made.run, attempt, end=attempt.end, max_bytes=QUICK_BYTES)


def codes(diagnosis: Diagnosis) -> list[str]:
    return [finding.code for finding in diagnosis.findings]


def only(diagnosis: Diagnosis) -> Finding:
    assert len(diagnosis.findings) == 1, codes(diagnosis)
    return diagnosis.findings[0]


SPINNING = {"gpu_utilization_percent": 100, "power_w": 70.0}
"""In a collective that never completes."""
MOVING = {"gpu_utilization_percent": 99, "power_w": 190.0}


def played(
    scene: Scene,
    *,
    steps: dict[str, Any] | None = None,
    silence: float = 0.0,
    gpus: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    odd: dict[str, Any] | None = None,
    ranks: list[list[float]] | None = None,
    cause: str = "preempted",
    detail: str = "",
) -> Diagnosis:
    """Steps (None: none were taken), then silence, the readings of all that time, and how it ended."""
    if steps is not None:
        scene.steps(**steps)
    scene.silence(silence)
    if gpus is not None:
        scene.gpus(gpus, after, odd=odd)
    if ranks is not None:
        scene.ranks(ranks)
    return scene.end(cause, detail)
