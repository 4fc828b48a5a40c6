"""A group's run root as two months leave it: finished, preempted, failed, running and queued runs.

root = make_history(tmp_path / "runs", now=time.time())
"""

import math
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.files import append_record, write_json
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.recorded import RecordedRun, loss_of

DAY = 86400.0
HOSTILE = "<script>alert(1)</script>"


class GroupRun(RecordedRun):
    """A run with an estimate, an r1hpc stage and steps of any length; hours are those of the attempt."""

    def __init__(
        self, path: Path, start: float, *, gpus: int = 32, stage: str = "pretrain", steps: int = 200
    ):
        super().__init__(path, num_steps=steps, gpus=gpus, nodes=max(1, gpus // 8))
        text = self.run.config.read_text().replace("stage: pretrain", f"stage: {stage}")
        self.run.config.write_text(text)
        self.clock, self.stage, self.num_steps = start, stage, steps
        write_json(self.run.plan, {"num_steps": steps, "gpu_hours_ceiling": gpus * 48.0})

    def estimate(self, p10: float, p50: float, p90: float) -> None:
        write_json(self.run.path / "estimate.json", {"gpu_hours": {"p10": p10, "p50": p50, "p90": p90}})

    def work(self, first: int, last: int, hours: float, startup_h: float = 0.1, save_every: int = 25) -> None:
        """Steps first..last in `hours` of an attempt that has begun."""
        writer = MetricWriter(self.run, self.attempts)
        step_s = 3600 * (hours - startup_h) / (last - first + 1)
        self.clock += 3600 * startup_h
        for step in range(first, last + 1):
            self.clock += step_s
            save = step % save_every == 0
            wave = 0.42 + 0.02 * math.sin(step / 9) - (0.12 if step % 61 == 0 else 0.0)
            reward = {"reward": 0.1 + 0.75 * (1 - math.exp(-step / 90)) + 0.03 * math.sin(step * 7.7)}
            writer.step(
                global_step=step,
                time=self.clock - (0.09 * step_s if save else 0.0),
                loss=loss_of(step),
                grad_norm=1.0 / step,
                lr=3e-4,
                tokens=step * 2**19,
                step_time_s=step_s * (0.9 if save else 0.98),
                tokens_per_second=2**19 / step_s,
                mfu=wave,
                **(reward if self.stage == "rl" else {}),
            )
            if save:
                writer.event("save", time=self.clock, global_step=step, seconds=0.08 * step_s, bytes=2**33)

    def gpu_log(self, start: float, hours: float, source: str = "nvml", gpus: int = 4) -> None:
        """A reading every 6 minutes of `gpus` GPUs, beginning with a quiet start-up."""
        static = [
            {"uuid": f"GPU-{i}", "index": i, "name": "NVIDIA A100-SXM4-80GB", "power_limit_w": 400.0}
            for i in range(gpus)
        ]
        path, stamp = self.run.gpu_metrics("n1"), {"node": "n1", "attempt": self.attempts}
        head = {"event": "devices", "time": start, "period_s": 360.0, "source": source, "driver": "550"}
        append_record(path, {**head, **stamp, "gpus": static}, durable=False)
        for tick in range(int(hours * 10)):
            busy = tick > 1 and tick % 40 != 0
            readings = [
                {
                    "uuid": f"GPU-{i}",
                    "gpu_utilization_percent": 93 + (tick * (i + 3)) % 7 if busy else 2,
                    "power_w": 335.0 + 30 * math.sin(tick / 5 + i) if busy else 63.0,
                    "memory_used_bytes": (52 + i) * 2**30,
                }
                for i in range(gpus)
            ]
            line = {"time": start + 360 * tick, "source": source, "gpus": readings}
            append_record(path, {**line, **stamp}, durable=False)


def make_history(root: Path, now: float) -> Path:
    """Nine runs over the 56 days before `now`; the newest one still waits."""
    root.mkdir(parents=True)
    begin = now - 56 * DAY
    _plain(root / "smoke-first", begin, 8, "finished", 2.0, (10, 14, 20))
    _plain(root / "data-traces", begin + 6 * DAY, 16, "finished", 30.0, (300, 420, 600), stage="traces")
    _interrupted(root / "pretrain-1b", begin + 12 * DAY)
    _plain(root / "pretrain-ablation", begin + 24 * DAY, 32, "crash", 9.0, (500, 700, 1000))
    _plain(root / "sft-cold-start", begin + 30 * DAY, 32, "finished", 26.0, (620, 900, 1320), stage="sft")
    _plain(root / "grpo-pilot", begin + 38 * DAY, 64, "finished", 18.0, (700, 1000, 1500), stage="rl")
    _plain(root / "eval-math", begin + 41 * DAY, 8, "finished", 3.5, (18, 25, 36), stage="evaluate")
    _running(root / "grpo-long-context-with-a-rather-long-name", now)
    waiting = GroupRun(root / "distill-1.5b", now - 0.4 * DAY, gpus=32, stage="sft")
    waiting.estimate(350, 520, 800)
    waiting.submit("9100", "slurm")
    return root


def _plain(
    path: Path,
    start: float,
    gpus: int,
    cause: str,
    hours: float,
    planned: Sequence[float],
    stage: str = "pretrain",
) -> None:
    """One attempt after a wait."""
    made = GroupRun(path, start, gpus=gpus, stage=stage)
    made.estimate(*planned)
    made.submit("9000", "slurm")
    made.clock += 1800 * gpus / 8
    made.begin()
    made.gpu_log(made.clock, hours)
    made.work(1, 200 if cause == "finished" else 80, hours)
    made.clock += 60
    made.end(cause, 200 if cause == "finished" else 75)


def _interrupted(path: Path, start: float) -> None:
    """Preempted twice, then a node failed: 22 steps were taken again."""
    made = GroupRun(path, start, gpus=64)
    made.estimate(2400, 3300, 4900)
    made.submit("9001", "slurm")
    legs = [(1, 60, "preempted", 60), (61, 120, "preempted", 120), (121, 147, "node_fail", 125)]
    for first, last, cause, committed in [*legs, (126, 200, "finished", 200)]:
        made.clock += 5 * 3600
        made.begin(resumed_from=first - 1 or None)
        hours = 0.28 * (last - first + 1)
        made.gpu_log(made.clock, hours)
        made.work(first, last, hours)
        made.clock += 1800 if cause == "node_fail" else 40
        made.end(cause, committed)


def _running(path: Path, now: float) -> None:
    """A third done, on the test library's GPUs."""
    made = GroupRun(path, now - 3.2 * DAY, gpus=32, stage="rl", steps=600)
    made.estimate(2600, 3900, 6100)
    made.submit("9002", "slurm")
    made.clock += 0.6 * DAY
    made.begin()
    made.gpu_log(made.clock, (now - made.clock) / 3600 - 0.2, source="stub")
    made.work(1, 210, (now - made.clock) / 3600 - 0.05)
