"""Write a run's current values as a file for the textfile collector of Prometheus' node_exporter.

It needs no library and no port. The format is Prometheus' text exposition format 0.0.4; the collector reads
*.prom, wants each file replaced by a rename, and refuses timestamps (node_exporter, collector/textfile.go). A
GPU is named by its UUID, since indices differ between a job's view and the node's.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.choose_run import flat_name, full_name
from r1hpc.base.files import write_atomic
from r1hpc.base.records import mistake
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.lines import Tick, read_tail
from r1hpc.telemetry.records.metrics import Step, is_number, last_steps
from r1hpc.telemetry.records.ranks import read_rank_times

_TAIL_BYTES = 2**17
"""Bytes read from the end of each file: some ticks of eight GPUs, and a few records of a thousand ranks."""
_FRESH_S = 120.0
"""Maximum age of a reading. Samplers read every few seconds, or as rarely as their last two readings show."""
_STEP = {
    "global_step": ("r1hpc_global_step", "Optimizer steps that are finished."),
    "loss": ("r1hpc_loss", "Loss of the newest step."),
    "lr": ("r1hpc_learning_rate", "Learning rate of the newest step."),
    "grad_norm": ("r1hpc_gradient_norm", "Gradient norm before clipping."),
    "tokens": ("r1hpc_tokens", "Tokens trained on since step 0."),
    "tokens_per_second": ("r1hpc_tokens_per_second", "Of the newest step, over all ranks."),
    "step_time_s": ("r1hpc_step_time_seconds", "Wall time of the newest step."),
    "data_time_s": ("r1hpc_data_time_seconds", "Of it, waiting for data on rank 0."),
    "mfu": ("r1hpc_mfu_ratio", "Model FLOPs utilisation, without recomputation."),
    "reward": ("r1hpc_reward", "Mean reward of the newest rollout."),
    "attempt": ("r1hpc_attempt", "Attempt that took the newest step."),
    "time": ("r1hpc_last_step_timestamp_seconds", "When the newest step ended."),
}
_GPU = {
    "gpu_utilization_percent": ("r1hpc_gpu_utilization_percent", "Time with a kernel running."),
    "power_w": ("r1hpc_gpu_power_watts", "Power draw of the card."),
    "memory_used_bytes": ("r1hpc_gpu_memory_used_bytes", "Device memory in use."),
    "temperature_c": ("r1hpc_gpu_temperature_celsius", "Temperature of the card."),
    "sm_clock_mhz": ("r1hpc_gpu_sm_clock_hertz", "Clock of the multiprocessors."),
    "energy_j": ("r1hpc_gpu_energy_joules_total", "Since the driver was loaded."),
    "ecc_uncorrected_volatile": (
        "r1hpc_gpu_ecc_uncorrected_total",
        "Memory errors since the driver was loaded.",
    ),
}
_RANK_STEP, _RANK_WAIT = "r1hpc_rank_step_time_seconds", "r1hpc_rank_wait_seconds"
_WRITTEN = "r1hpc_written_timestamp_seconds"
_HELP = {
    **dict([*_STEP.values(), *_GPU.values()]),
    _RANK_STEP: "Mean step time of a rank.",
    _RANK_WAIT: "Of it, waiting for other ranks.",
    _WRITTEN: "When this file was written.",
}
"""Constant: node_exporter drops metrics whose help differs between two files."""

Sample = tuple[str, dict[str, str], float]


def textfile(run: RunDir, folder: str | Path | None) -> Path:
    """Return the path of the run's file; see write_textfile."""
    return run.metrics / "r1hpc.prom" if folder is None else Path(folder) / f"r1hpc-{flat_name(run)}.prom"


def write_textfile(run: RunDir, folder: str | Path | None = None) -> Path:
    """Replace the run's file by its current values; return its path.

    In a collector's `folder` the site's node_exporter reads it as another user; None: the run's.
    """
    path = textfile(run, folder)
    write_atomic(path, render(collect(run)), 0o600 if folder is None else 0o644)
    return path


def collect(run: RunDir) -> list[Sample]:
    labels = {"run": full_name(run)}
    samples: list[Sample] = [(_WRITTEN, labels, time.time())]
    newest = last_steps(run, 1)
    attempt = newest[-1].attempt if newest else None
    for step in newest:
        known = [(name, step.number(key)) for key, (name, _) in _STEP.items()]
        samples += [(name, labels, value) for name, value in known if value is not None]
    times = None if attempt is None else read_rank_times(run, attempt, _TAIL_BYTES)
    if times is not None:
        for metric, rows in ((_RANK_STEP, times.step_time_s), (_RANK_WAIT, times.wait_s)):
            for rank, seconds in enumerate(rows[-1]):
                node = {"node": times.nodes[rank]} if rank < len(times.nodes) else {}
                samples.append((metric, {**labels, **node, "rank": str(rank)}, seconds))
    uuids = times.gpu_uuids if times is not None else ()
    ranks = {uuid: str(rank) for rank, uuid in enumerate(uuids) if uuid is not None}
    nodes = []
    for path in run.all_gpu_metrics:
        records = read_tail(path, _TAIL_BYTES).records
        if last := [r for r in records if "event" not in r and mistake(r, Tick) is None][-2:]:
            nodes.append(last)
    ticks = _fresh(nodes, newest)
    attempts = [tick.get("attempt") or 0 for tick in ticks]
    for tick, number in zip(ticks, attempts, strict=True):
        if number == max(attempts):  # else from a node of an earlier attempt
            samples += _of_gpus(tick, labels, ranks)
    return samples


def _fresh(nodes: Sequence[Sequence[dict[str, Any]]], newest: Sequence[Step]) -> list[dict[str, Any]]:
    """Return readings near the run's newest sign of life, without a dead sampler's.

    `nodes` has the last two ticks of each.
    """
    times = [[float(tick["time"]) for tick in ticks] for ticks in nodes]
    last = [each[-1] for each in times]
    now = max([*last, *(step.time for step in newest if step.time is not None)], default=0.0)
    patience = [max(_FRESH_S, 3 * (each[-1] - each[0])) for each in times]
    return [ticks[-1] for ticks, at, most in zip(nodes, last, patience, strict=True) if now - at <= most]


def render(samples: Iterable[Sample]) -> str:
    """Return the text: samples of one metric together, under its HELP and TYPE."""
    grouped: dict[str, list[Sample]] = {}
    for sample in samples:
        grouped.setdefault(sample[0], []).append(sample)
    lines = []
    for metric, group in grouped.items():
        kind = "counter" if metric.endswith("_total") else "gauge"
        lines += [f"# HELP {metric} {_HELP[metric]}", f"# TYPE {metric} {kind}"]
        for _, labels, value in group:
            inside = ",".join(f'{name}="{_escape(text)}"' for name, text in labels.items())
            lines.append(f"{metric}{{{inside}}} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _of_gpus(newest: dict[str, Any], labels: dict[str, str], ranks: dict[str, str]) -> Iterator[Sample]:
    """Yield a node's newest tick. `source` appears only as "stub"."""
    stub = {"source": "stub"} if newest.get("source") == "stub" else {}
    for gpu in newest["gpus"]:
        uuid = str(gpu.get("uuid"))
        rank = {"rank": ranks[uuid]} if uuid in ranks else {}
        own = {**labels, "node": str(newest.get("node")), "gpu": uuid, **rank, **stub}
        for key, (metric, _) in _GPU.items():
            if is_number(gpu.get(key)):
                yield metric, own, gpu[key] * (1e6 if key == "sm_clock_mhz" else 1.0)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)
