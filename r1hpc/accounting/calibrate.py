"""The finished runs under a run root, each with its estimate and with the hours it really took.

    site = finished_runs(run_root)
    site.of("A100-SXM4-80GB"), site.left_out
    site_correction(run_root, "cpu").apply(estimate)

A finished run does not change, so what was found is kept in RUN_ROOT/calibration.json; the file may be
removed at any time. What Slurm could not be asked about is not kept, and asked again the next time.
"""

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1hpc.accounting.correction import CPU, Correction, FinishedRun, correction
from r1hpc.accounting.forecast import Spread
from r1hpc.attempt.state import all_slurm_jobs
from r1hpc.base.choose_run import all_runs, full_name
from r1hpc.base.errors import StateError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.rundir import RunDir
from r1hpc.plan.hardware import UnknownGpuError, find_gpu
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import JobRecord, sacct_records
from r1hpc.telemetry.attempts import History, read_history
from r1hpc.telemetry.tail import read_tail

_VERSION = 3
_CACHE = "calibration.json"
_SACCT_TIMEOUT_S = 10.0
_JOBS_PER_CALL = 200
_DAY = 86400.0
_STUB = re.compile(rb'"source": ?"stub"')
_CHUNK = 2**22


@dataclass(frozen=True)
class Site:
    """What a run root has to say."""

    runs: tuple[FinishedRun, ...]
    """Oldest first."""
    left_out: Mapping[str, int]
    """How many runs did not enter, by reason."""

    @property
    def resources(self) -> list[str]:
        return sorted({run.resource for run in self.runs})

    def of(self, resource: str) -> list[FinishedRun]:
        return [run for run in self.runs if run.resource == resource]


def site_correction(run_root: Path, resource: str) -> Correction:
    """How this site corrects an estimate for a GPU of any usual name, or CPU."""
    name = resource_name(resource)
    return correction(name, finished_runs(run_root).of(name))


def resource_name(name: str) -> str:
    """One name for each card, also where it is not in the table."""
    if name == CPU:
        return CPU
    try:
        return find_gpu(name).name
    except UnknownGpuError:
        return name


def finished_runs(run_root: Path) -> Site:
    """Every run under `run_root`, stages of chains among them."""
    cache = _read_cache(run_root)
    runs: list[FinishedRun] = []
    left_out: Counter[str] = Counter()
    fresh: list[_Candidate] = []
    kept: dict[str, Any] = {}
    for run in all_runs(run_root):
        name = full_name(run)
        if not run.finished.exists():
            left_out["not finished"] += 1
            continue
        mark = [run.finished.stat().st_mtime_ns, _mtime_ns(run.path / "estimate.json")]
        known = cache.get(name)
        if known is not None and known["mark"] == mark:
            kept[name] = known
            _take(known, runs, left_out)
        else:
            fresh.append(_Candidate(run, mark, read_history(run)))
    slurm = _ask_slurm(fresh)
    for candidate in fresh:
        entry, is_final = _judge(candidate, slurm)
        _take(entry, runs, left_out)
        if is_final:
            kept[full_name(candidate.run)] = entry
    if kept != cache:
        # A run root of somebody else can be read and not written: then nothing is kept.
        with contextlib.suppress(OSError):
            write_json(run_root / _CACHE, {"version": _VERSION, "runs": kept})
    return Site(tuple(sorted(runs, key=lambda run: run.finished_at)), dict(left_out))


@dataclass(frozen=True)
class _Candidate:
    run: RunDir
    mark: list[int]
    """What must not have changed for a kept answer to hold."""
    history: History


class _LeftOutError(Exception):
    """Why a run does not enter."""


def _judge(candidate: _Candidate, slurm: Mapping[str, Sequence[JobRecord]]) -> tuple[dict[str, Any], bool]:
    """The entry of a run for the cache, and whether it is final."""
    run, history = candidate.run, candidate.history
    try:
        resource = _resource(run, history)
        if _is_stub_fed(run):
            raise _LeftOutError("GPU readings from the stub library")
        estimate = _estimate(run, "node_hours" if resource == CPU else "gpu_hours")
        jobs = all_slurm_jobs(run)
        records = [record for job in jobs for record in slurm.get(job, ())]
        known = {record.job_id for record in records}
        is_known = all(attempt.job_id in known for attempt in history.attempts)
        by_slurm = _hours_by_slurm(records, resource) if is_known else 0.0
        actual = by_slurm or _hours_by_run(history, resource)
        if actual <= 0:
            raise _LeftOutError("no time on record")
    except _LeftOutError as error:
        return {"mark": candidate.mark, "left_out": str(error)}, True
    finished = FinishedRun(
        run_id=full_name(run),
        resource=resource,
        finished_at=candidate.mark[0] / 1e9,
        estimate=estimate,
        actual=actual,
        source="sacct" if by_slurm else "run",
    )
    # slurmdbd hears of the end a little after the run itself, and may know a part of the jobs only.
    is_final = not jobs or (by_slurm > 0 and all(record.end is not None for record in records))
    return {"mark": candidate.mark, "run": asdict(finished)}, is_final


def _take(entry: Mapping[str, Any], runs: list[FinishedRun], left_out: Counter[str]) -> None:
    if "left_out" in entry:
        left_out[entry["left_out"]] += 1
    else:
        runs.append(FinishedRun(**{**entry["run"], "estimate": Spread(**entry["run"]["estimate"])}))


def _resource(run: RunDir, history: History) -> str:
    """What the run ran on, if that is what it was estimated for.

    NVML's word comes first; without it that of the configuration. A card that was only assumed tells nothing.
    """
    if not any(attempt.gpus for attempt in history.attempts):
        return CPU
    estimated, is_given = _gpu_estimated(_read(run.path / "estimate.json"))
    found = _gpu_seen(run) or (estimated if is_given else None)
    if found is None:
        raise _LeftOutError("GPU not known")
    if estimated is not None and resource_name(estimated) != resource_name(found):
        raise _LeftOutError("estimated for another GPU than it ran on")
    return resource_name(found)


def _gpu_estimated(stored: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The card of an estimate, and whether the configuration gave it."""
    assumptions = stored.get("assumptions")
    known = assumptions if isinstance(assumptions, dict) else {}
    name = known.get("gpu")
    return str(name) if name else None, known.get("gpu_given") is True


def _gpu_seen(run: RunDir) -> str | None:
    for path in sorted(run.metrics.glob("gpu-*.jsonl")):
        first = read_tail(path, 0).first or {}
        for gpu in first.get("gpus", ()):
            if gpu.get("name"):
                return str(gpu["name"])
    return None


def _is_stub_fed(run: RunDir) -> bool:
    """Whether any sampler of any attempt read the test library, wherever in the file."""
    return any(_contains_stub(path) for path in run.metrics.glob("gpu-*.jsonl"))


def _contains_stub(path: Path) -> bool:
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if _STUB.search(rest + chunk):
                return True
            rest = chunk[-32:]
    return False


def _estimate(run: RunDir, key: str) -> Spread:
    """The estimate stored at submission, before any correction."""
    stored = _read(run.path / "estimate.json")
    value = stored.get("uncorrected", stored).get(key)
    if value is None:
        raise _LeftOutError("no estimate")
    try:
        spread = Spread(*(float(value[name]) for name in ("p10", "p50", "p90")))
    except (KeyError, TypeError, ValueError, AssertionError):
        raise _LeftOutError("an estimate that cannot be read") from None
    if not 0 < spread.p50 < math.inf:
        raise _LeftOutError("an estimate of nothing")
    return spread


def _hours_by_slurm(records: Sequence[JobRecord], resource: str) -> float:
    width = [record.nodes if resource == CPU else record.gpus for record in records]
    return sum(n * record.elapsed_s for n, record in zip(width, records, strict=True)) / 3600


def _hours_by_run(history: History, resource: str) -> float:
    return sum(
        (a.nodes if resource == CPU else a.gpus) * max(0.0, (a.end or a.start) - a.start) / 3600
        for a in history.attempts
    )


def _ask_slurm(candidates: Sequence[_Candidate]) -> dict[str, list[JobRecord]]:
    """Every record of the candidates' jobs, by job; nothing where sacct cannot be asked."""
    submitted = {
        job: min((s.get("time", 0.0) for s in c.history.submissions), default=0.0)
        for c in candidates
        for job in all_slurm_jobs(c.run)
    }
    jobs = sorted(submitted)
    found: dict[str, list[JobRecord]] = defaultdict(list)
    for i in range(0, len(jobs), _JOBS_PER_CALL):
        some = jobs[i : i + _JOBS_PER_CALL]
        # A day earlier, for clocks that differ. Slurm counts job ids anew when its state is lost.
        since = max(0.0, min(submitted[job] for job in some) - _DAY)
        try:
            records = sacct_records(",".join(some), since, _SACCT_TIMEOUT_S)
        except (SlurmError, StateError):
            return {}
        for record in records:
            if record.start is not None and record.start >= submitted.get(record.job_id, 0.0) - _DAY:
                found[record.job_id].append(record)
    return found


def _read_cache(run_root: Path) -> dict[str, Any]:
    cache = _read(run_root / _CACHE)
    runs = cache.get("runs")
    if cache.get("version") != _VERSION or not isinstance(runs, dict):
        return {}
    return {name: entry for name, entry in runs.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    """Whether `_take` can take it: another program, or a hand, may have written there."""
    try:
        _take(entry, [], Counter())
        return "mark" in entry
    except (TypeError, KeyError, AttributeError, AssertionError):
        return False


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        value = read_json(path)
    except (OSError, StateError):
        return {}
    return value if isinstance(value, dict) else {}


def _mtime_ns(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
