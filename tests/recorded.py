"""Run folders as a run leaves them, written by the writers that a run uses, with times that were chosen.

recorded = RecordedRun(tmp_path / "runs" / "demo")
recorded.submit("local-1")
recorded.attempt(first=1, last=20, cause="preempted", committed=15)
recorded.attempt(first=16, last=40, cause="finished", committed=40)
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1hpc.attempt.state.slurm_records import learn
from r1hpc.base.files import append_record, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.config.schema.rl import EvaluateConfig, GenerateConfig
from r1hpc.config.schema.run import RunConfig, TrainConfig
from r1hpc.config.stages import in_parts
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.records.attempts import record
from r1hpc.telemetry.records.metrics import MetricWriter

EPOCH = 1_790_000_000.0
GLOBAL_BATCH = 8
SEQ_LEN = 16
TOKENS_PER_STEP = GLOBAL_BATCH * SEQ_LEN


def loss_of(step: int) -> float:
    """A pure function of the step, as deterministic training is."""
    return 2.0 + 5.0 * math.exp(-step / 60) + 0.15 * math.sin(step * 12.9898) * math.cos(step * 78.233)


def bytes_read() -> int:
    """What this process has asked of read() since it began, in bytes (proc(5): rchar)."""
    return int(Path("/proc/self/io").read_text().split()[1])


class RecordedRun:
    """Writes one run, attempt after attempt; `clock` is the time it has come to."""

    def __init__(
        self, path: Path, num_steps: int = 40, gpus: int = 0, nodes: int = 1, stage: str = "pretrain"
    ) -> None:
        self.run = RunDir(path)
        self.run.create()
        config = RunConfig(stage=stage, train=TrainConfig(num_steps=num_steps))
        if in_parts(stage):
            generated = GenerateConfig(num_items=num_steps, items_per_part=1)
            config = replace(config, generate=generated, evaluate=EvaluateConfig(num_items=num_steps))
        load.save(config, self.run.config)
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.gpus = gpus
        self.clock = EPOCH
        self.attempts = 0
        self.job_id = ""
        self.executor = ""

    def submit(self, job_id: str, executor: str = "local") -> None:
        self.job_id, self.executor = job_id, executor
        record(self.run, "submitted", time=self.clock, executor=executor, job_id=job_id, script="job.sh")
        self.clock += 5

    def begin(self, host: str | None = None, resumed_from: int | None = None) -> int:
        self.attempts += 1
        record(
            self.run,
            "begin",
            time=self.clock,
            attempt=self.attempts,
            token="0" * 16,
            job_id=self.job_id,
            executor=self.executor,
            host=host,
            node_names=self.nodes,
            gpus=self.gpus,
            ranks=max(1, self.gpus),
            resumed_from=resumed_from,
        )
        log = self.run.rank_log(self.attempts, 0)
        log.parent.mkdir(mode=0o700)
        log.touch(mode=0o600)
        return self.attempts

    def steps(
        self,
        first: int,
        last: int,
        step_s: float = 1.0,
        startup_s: float = 10.0,
        save_every: int = 0,
        **extra: float,
    ) -> None:
        """Metrics, ledger and log of steps of the attempt that has begun; `extra` as a stage adds it."""
        writer = MetricWriter(self.run, self.attempts)
        self.clock += startup_s
        for step in range(first, last + 1):
            self.clock += step_s
            writer.step(
                global_step=step,
                time=self.clock,
                loss=loss_of(step),
                grad_norm=1.0 / step,
                lr=3e-4 * min(1.0, step / 10),
                tokens=step * TOKENS_PER_STEP,
                step_time_s=step_s,
                data_time_s=0.01,
                tokens_per_second=TOKENS_PER_STEP / step_s,
                mfu=0.4 / step_s if self.gpus else None,
                loss_scale=None,
                skipped=False,
                **extra,
            )
            self.consume(step)
            if save_every and step % save_every == 0:
                self.clock += 0.5
                writer.event("save", time=self.clock, global_step=step, seconds=0.5, bytes=1024)
            self.log(f"step {step}")

    def parts(self, first: int, last: int, part_s: float = 1.0, startup_s: float = 10.0) -> None:
        """Finished parts of a stage that is made in them, numbered from 0, one after the other."""
        self.clock += startup_s
        for number in range(first, last + 1):
            self.clock += part_s
            self.finish(self.run.parts / f"part-{number:06d}.jsonl")

    def finish(self, path: Path) -> None:
        """A piece of work that lies finished on disk from now on."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        os.utime(path, (self.clock, self.clock))

    def consume(self, step: int, first: int | None = None, attempt: int | None = None) -> None:
        """The ledger line of a step."""
        k = attempt or self.attempts
        start = (step - 1) * GLOBAL_BATCH if first is None else first
        line = {
            "global_step": step,
            "attempt": k,
            "first_sample": start,
            "num_samples": GLOBAL_BATCH,
            "sample_sum": sum(range(start, start + GLOBAL_BATCH)),
            "checksum": 17 * start,
        }
        append_record(self.run.ledger / f"attempt_{k}.jsonl", line, durable=False)

    def log(self, line: str, rank: int = 0) -> None:
        with self.run.rank_log(self.attempts, rank).open("a") as file:
            file.write(line + "\n")

    def end(
        self, cause: str, committed: int | None = None, detail: str = "", requeued: bool | None = None
    ) -> None:
        again = ("preempted", "timeout", "node_fail")
        record(
            self.run,
            "end",
            time=self.clock,
            attempt=self.attempts,
            cause=cause,
            detail=detail,
            exit_status=0,
            last_committed_step=committed,
            requeued=cause in again if requeued is None else requeued,
            inferred=False,
        )
        if cause == "finished":
            write_json(self.run.finished, {"global_step": committed, "time": self.clock})

    def attempt(
        self, first: int, last: int, cause: str, committed: int | None = None, detail: str = "", **how: Any
    ) -> None:
        """One attempt from begin to end, and two seconds until the next."""
        self.begin(resumed_from=first - 1 or None)
        self.steps(first, last, **how)
        self.clock += 2
        self.end(cause, committed, detail)
        self.clock += 2

    def accounted(self, state: str, start: float) -> None:
        """What `report` learnt from sacct: the job's only allocation, from `start` until now."""
        elapsed = int(self.clock - start)
        record = JobRecord(self.job_id, state, start, self.clock, elapsed, 1, 1, "n1", "0:0", 0, *("x",) * 5)
        learn(self.run, [record], self.clock, self.clock)

    def checkpoint(self, step: int) -> None:
        """A committed checkpoint of one small file."""
        store = CheckpointStore(self.run.checkpoints)
        store.begin(max(1, self.attempts), "0" * 16)
        folder = store.open_staging(step, max(1, self.attempts), "0" * 16)
        (folder / "rank_0.pt").write_bytes(b"weights")
        records = store.seal(folder, ["rank_0.pt"])
        store.commit(step, max(1, self.attempts), "0" * 16, records, {"global_step": step})

    def gpu_ticks(
        self, start: float, seconds: int, source: str = "nvml", node: str = "n1", gpus: int = 2
    ) -> None:
        """metrics/gpu-<node>.jsonl, one tick a second: start-up idles, then work in a wave."""
        path = self.run.gpu_metrics(node)
        uuids = [f"GPU-{node}-{i}" for i in range(gpus)]
        static = [
            {
                "uuid": uuid,
                "index": i,
                "name": "NVIDIA A100-SXM4-80GB",
                "memory_total_bytes": 80 * 2**30,
                "power_limit_w": 400.0,
            }
            for i, uuid in enumerate(uuids)
        ]
        stamp = {"node": node, "attempt": self.attempts}
        lines: list[dict[str, Any]] = [
            {
                "event": "devices",
                "time": start,
                **stamp,
                "period_s": 1.0,
                "source": source,
                "driver": "550",
                "gpus": static,
            }
        ]
        for tick in range(seconds):
            busy = tick > 10
            readings = [
                {
                    "uuid": uuid,
                    "gpu_utilization_percent": 95 + (tick + i) % 5 if busy else 0,
                    "power_w": 330.0 + 40 * math.sin(tick / 3 + i) if busy else 62.0,
                    "memory_used_bytes": (30 + i) * 2**30 if busy else 2**29,
                    "energy_j": 300.0 * tick,
                    "temperature_c": 60,
                    "throttle_reasons": ["sw_power_cap"] if tick % 10 == 0 else [],
                }
                for i, uuid in enumerate(uuids)
            ]
            lines.append({"time": start + tick, **stamp, "source": source, "gpus": readings})
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def no_driver(self, message: str, node: str = "n1") -> None:
        line = {
            "event": "no_driver",
            "time": self.clock,
            "node": node,
            "attempt": self.attempts,
            "message": message,
        }
        append_record(self.run.gpu_metrics(node), line, durable=False)
