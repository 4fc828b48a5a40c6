"""Begin an attempt, once, on the batch host: close the last one, fence it off, number the new one."""

import os
import secrets
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1hpc.attempt.cause import Evidence, SchedulerView, decide
from r1hpc.attempt.dataset import build, ensure_traces
from r1hpc.attempt.needs import unmet
from r1hpc.attempt.outcome import read_outcomes
from r1hpc.attempt.slurm_records import learn
from r1hpc.attempt.state import ask, job_named
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.rundir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.load import read
from r1hpc.config.schema import RunConfig
from r1hpc.data.recipe import find_recipe
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import sacct_records
from r1hpc.telemetry.attempts import (
    Attempt,
    Cause,
    History,
    gpu_hours_used,
    read_history,
    reason_to_stop,
    record,
)

# A job that was cancelled may still be saving: KillWait is 30 s unless a site says otherwise.
_LEAVING_S = 45.0


_READS_SHARDS = ("pretrain", "sft")


@dataclass(frozen=True)
class AttemptFacts:
    """What the batch host leaves for the ranks, in attempts/<k>/attempt.json."""

    attempt: int
    token: str
    dataset_path: str
    """Empty for the stages that read no shards."""
    ranks: int


class MustNotGoOnError(R1hpcError):
    """The run may not be started again as it is; the message says why."""


def begin(run: RunDir, executor: str, job_id: str, node_names: tuple[str, ...], ranks: int) -> int | None:
    """Begin the next attempt and return its number; None when the run is finished or STOP is there.

    Raises:
        MustNotGoOnError: a limit of `limits` is reached, a person has cancelled it, a stage it needs is not
            finished, or another job of the run is at work.
    """
    if run.finished.exists():
        print(f"{run.run_id} is finished: nothing to do", file=sys.stderr)
        return None
    config = read(run.config)
    _refuse_a_second_job(run, job_id)
    close_unended(run, config, job_id)
    if run.stop.exists():
        print(f"{run.stop} exists: not starting; remove it and submit with --resume", file=sys.stderr)
        return None
    missing = unmet(run)
    if missing:
        raise MustNotGoOnError(
            f"{run.run_id} does not begin: it needs {', '.join(missing)}, not finished yet. "
            "Submit the chain again: it goes on there"
        )
    history = read_history(run)
    reason = (
        reason_to_stop(history.since_submission, config.limits)
        or _cancelled(run, history, job_id)
        or _out_of_hours(history, config)
    )
    if reason is not None:
        raise MustNotGoOnError(
            f"{run.run_id} is not started again: {reason}. `submit --resume` asks for more"
        )
    dataset = str(ensure_dataset(run, config)) if config.stage in _READS_SHARDS else ""
    attempt = (history.last.attempt if history.last else 0) + 1
    token = secrets.token_hex(8)
    store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
    store.begin(attempt, token)
    _make_folders(run, attempt)
    facts = AttemptFacts(attempt, token, dataset, ranks)
    write_json(run.attempt_dir(attempt) / "attempt.json", asdict(facts))
    record(
        run,
        "begin",
        attempt=attempt,
        token=token,
        job_id=job_id,
        executor=executor,
        host=socket.gethostname(),
        node_names=list(node_names),
        gpus=_num_gpus(config, executor, ranks, len(node_names)),
        ranks=ranks,
        resumed_from=newest_step(run, store),
    )
    return attempt


def read_facts(run: RunDir, attempt: int) -> AttemptFacts:
    """What begin wrote for the ranks of this attempt."""
    return AttemptFacts(**read_json(run.attempt_dir(attempt) / "attempt.json"))


def newest_step(run: RunDir, store: CheckpointStore) -> int | None:
    """The newest committed step, unverified, or how many parts are done; None before the first."""
    found = store.list()
    if found:
        return found[0].step
    return len(list(run.parts.glob("part-*.jsonl"))) or None


def _refuse_a_second_job(run: RunDir, job_id: str) -> None:
    """Two jobs in one folder: the later one leaves. Where nobody can be asked the fence has to do."""
    last = read_history(run).last
    if last is None or last.cause is not None or last.job_id in (None, job_id):
        return
    deadline = time.monotonic() + _LEAVING_S
    while ask(run, job_named(run, last.job_id), timeout_s=10.0).alive:
        if time.monotonic() > deadline:
            raise MustNotGoOnError(
                f"{run.run_id} is at work already, as job {last.job_id} in attempt {last.attempt}: "
                "this job leaves it alone"
            )
        time.sleep(2.0)


def close_unended(run: RunDir, config: RunConfig, job_id: str) -> None:
    """Write the `end` that a killed attempt could not write itself. `job_id`: the job that begins now."""
    history = read_history(run)
    last = history.last
    if last is None or last.cause is not None:
        return
    view, ended = _seen_by_sacct(run, last)
    # Our own requeue is on record, so the attempt has an end then.
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    view = replace(view, restarted=last.job_id == job_id and restarts > 0)
    evidence = Evidence(
        ranks=last.ranks,
        outcomes=read_outcomes(run, last.attempt),
        status=0,
        scheduler=view,
        cancel_requested=(history.cancel_requested_at or 0) > last.start,
    )
    cause, detail = decide(evidence)
    if cause is Cause.crash and not evidence.outcomes and not view.states:
        cause, detail = Cause.unknown, "ended without a record"
    store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
    record(
        run,
        "end",
        attempt=last.attempt,
        cause=cause.value,
        detail=detail,
        exit_status=None,
        last_committed_step=newest_step(run, store),
        requeued=True,
        inferred=True,
        ended=ended or _last_sign_of_life(run, last.attempt),
    )


def _cancelled(run: RunDir, history: History, job_id: str) -> str | None:
    """Why a cancel forbids another attempt; Slurm restarts a job that is requeued just after its scancel."""
    # A job that is not on record is that of a newer submission, which is written down after sbatch.
    if not history.is_cancelled or job_named(run, job_id) is None:
        return None
    return "it was cancelled"


def _out_of_hours(history: History, config: RunConfig) -> str | None:
    """Why the run's own limit of GPU-hours forbids another attempt."""
    most, used = config.limits.max_gpu_hours, gpu_hours_used(history, time.time())
    if most is None or used < most:
        return None
    return f"it has used {used:.2f} GPU-hours and limits.max_gpu_hours is {most:g}"


def ensure_dataset(run: RunDir, config: RunConfig) -> Path:
    """The dataset's folder: data.path, or built beside the runs from data.traces or data.recipe."""
    if config.data.path is not None:
        return Path(config.data.path)
    if config.data.traces:
        return ensure_traces(run, config)
    assert config.data.recipe is not None, "DataConfig refuses neither"
    recipe = find_recipe(config.data.recipe)
    target = run.path.parent / "datasets" / recipe.stem
    build(recipe, target)
    return target


def _make_folders(run: RunDir, attempt: int) -> None:
    for leftover in run.path.glob("universal-*"):  # of a conversion that was killed
        shutil.rmtree(leftover)
    for folder in (run.attempt_dir(attempt), run.attempt_logs(attempt)):
        shutil.rmtree(folder, ignore_errors=True)  # of a begin that died before it was recorded
        folder.mkdir(mode=0o700)
    latest = run.logs / "latest"
    fresh = run.logs / f".latest-{attempt}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run.attempt_logs(attempt).name)
    fresh.replace(latest)


def _num_gpus(config: RunConfig, executor: str, ranks: int, num_nodes: int) -> int:
    """GPUs allocated, used or not: what Slurm says it gave; else one for each rank of a GPU run."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "") if executor == "slurm" else ""
    if given.isdecimal():
        return int(given) * num_nodes
    is_cpu_run = config.resources.gpus_per_node == 0
    return 0 if is_cpu_run else ranks


def _seen_by_sacct(run: RunDir, last: Attempt) -> tuple[SchedulerView, float | None]:
    """What accounting says of the attempt: the record of its job that started last before it began."""
    if last.job_id is None or last.job_id.startswith("local-"):
        return SchedulerView(), None
    for _ in range(5):  # slurmdbd hears of a node failure a little later than the job restarts
        try:
            records = sacct_records(last.job_id)
        except SlurmError:
            return SchedulerView(), None
        mine = [r for r in records if r.start is not None and r.start <= last.start + 1 and r.end is not None]
        if mine and mine[-1].end is not None and mine[-1].end >= last.start:
            learn(
                run, mine, time.time()
            )  # what it held, for the ledger: Slurm's records do not stay for ever
            return SchedulerView(states=frozenset({mine[-1].state})), mine[-1].end
        time.sleep(1)
    return SchedulerView(), None


def _last_sign_of_life(run: RunDir, attempt: int) -> float | None:
    files = [run.train_metrics, *run.attempt_logs(attempt).glob("*"), *run.attempt_dir(attempt).glob("*")]
    times = [path.stat().st_mtime for path in files if path.exists()]
    return max(times, default=None)
