"""Begin an attempt on the batch host: close the last one, fence it off, number the new one.

`launch begin` in the job script calls it, or the local supervisor (local.py). limits.py and may_begin.py
decide whether an attempt may begin.

A stage of a chain begins only when the runs it needs are finished. Slurm's afterok cannot check this: a
stopped run ends with status 0, and a cluster that forbids requeueing continues a run in another job.
"""

import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypedDict

from r1hpc.attempt.limits import out_of_hours, reason_to_stop
from r1hpc.attempt.may_begin import (
    MustNotGoOnError,
    NotTheNodeError,
    alone,
    on_record,
    own_restarts,
    record_not_begun,
    refuse_a_ghost,
    refuse_a_second_job,
    refuse_the_same_full_disk,
)
from r1hpc.attempt.state.state import job_named, last_attempt_with_logs
from r1hpc.attempt.state.unended import close_unended, newest_step
from r1hpc.attempt.trackers import start_trackers
from r1hpc.attempt.workload import workload_of
from r1hpc.base.errors import StateError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import check_owned, is_listed, read_json, write_json
from r1hpc.base.run_dir import RunDir, check_private
from r1hpc.checkpoint.disk import walk
from r1hpc.checkpoint.fence import last_incarnation
from r1hpc.checkpoint.finished import check_inputs, inputs_now
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.load import read
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import counts_of
from r1hpc.slurm import payload
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.rank_env import expand_nodelist
from r1hpc.slurm.requeue import controller_time, job_state
from r1hpc.telemetry.records.attempts import Cause, read_history, read_run_events, record

_FILE = "needs.json"


class _Needs(TypedDict):
    needs: list[str]


def write_needs(run: RunDir, names: Sequence[str]) -> None:
    """Let `run` begin only once the runs of these names, in the same folder, are finished."""
    write_json(run.path / _FILE, {"needs": list(names)})


def is_stage(run: RunDir) -> bool:
    """True if the run belongs to a chain."""
    return (run.path / _FILE).is_file()


def unmet(run: RunDir) -> list[str]:
    """Return the names of the needed runs that are not finished."""
    if not is_stage(run):
        return []
    names: list[str] = read_json(run.path / _FILE, _Needs)["needs"]
    # Listed: NFS caches a missing name for up to a minute.
    return [name for name in names if not is_listed(RunDir(run.path.parent / name).finished)]


@dataclass(frozen=True)
class AttemptFacts:
    """Facts that the batch host leaves for the ranks, in attempts/<k>/attempt.json."""

    attempt: int
    token: str
    dataset_path: str
    """Folder of the dataset, as the workload's `prepare` returned it; or empty."""
    ranks: int
    ends_at: float | None = None
    """When the time limit ends the job, by time.monotonic() of the batch host, where rank 0 runs too."""


def begin(
    run: RunDir,
    executor: str,
    job_id: str,
    node_names: tuple[str, ...],
    ranks: int,
    *,
    by_submitit: bool = False,
) -> int | None:
    """Begin the next attempt and return its number; None if the run is finished or STOP exists.

    Raise MustNotGoOnError if a limit of `limits` is reached, the run was cancelled, a stage it needs is not
    finished, another job runs it, its data or configuration cannot be used, or others may write what is
    executed. Raise NotTheNodeError if the run's own disk is full, or its records are damaged. Raise
    R1hpcError or OSError if another try, perhaps on another node, may succeed.

    Args:
        by_submitit: the ranks are started from submitit's payload.
    """
    if run.finished.exists():
        print(f"{run.run_id} is finished: nothing to do", file=sys.stderr)
        return None
    with on_record(run, job_id), alone(run, job_id):
        return _begin(run, executor, job_id, node_names, ranks, by_submitit)


def _begin(
    run: RunDir, executor: str, job_id: str, node_names: tuple[str, ...], ranks: int, by_submitit: bool
) -> int | None:
    used = check_records(run)
    config = read(run.config)
    refuse_a_second_job(run, job_id)
    refuse_a_ghost(run, executor, job_id)
    failpoint("begin")
    last = read_history(run).last
    if last is not None:  # first of all: what follows writes, and the disk may be full
        CheckpointStore(run.checkpoints).drop_unfinished(last.attempt)
    _refuse_what_others_may_write(run, executor, job_id if by_submitit else None)
    if executor == "slurm":
        _record_excluded(run, config, job_id)
    close_unended(run, config, job_id)
    if run.stop.exists():
        print(f"{run.stop} exists: not starting; submit with --resume to go on", file=sys.stderr)
        record_not_begun(run, job_id, Cause.stopped, "STOP was touched before its next attempt began")
        return None
    missing = unmet(run)
    if missing:
        raise MustNotGoOnError(
            f"{run.run_id} does not begin: it needs {', '.join(missing)}, not finished yet. "
            "Submit the chain again to continue"
        )
    history = read_history(run)
    reason = (
        reason_to_stop(history.since_submission, config.limits, in_parts=counts_of(config.stage) == "parts")
        # Slurm restarts a job requeued just after its scancel. An unrecorded job belongs to a newer
        # submission, which is recorded after sbatch.
        or ("it was cancelled" if history.is_cancelled and job_named(run, job_id) is not None else None)
        or out_of_hours(history, config.limits)
    )
    if reason is not None:
        raise MustNotGoOnError(
            f"{run.run_id} is not started again: {reason}. Use `submit --resume` to continue",
            Cause.cancelled if history.is_cancelled else Cause.refused,
        )
    refuse_the_same_full_disk(run, history.last)
    _check_inputs(run, config, store := CheckpointStore(run.checkpoints, keep=config.checkpoint.keep))
    prepared = workload_of(config.stage).prepare(run, config)
    if prepared:
        refuse_a_ghost(run, executor, job_id, history)  # once more: preparing may have taken hours
    attempt = max(used, history.last.attempt if history.last else 0) + 1
    token, cluster = secrets.token_hex(8), os.environ.get("SLURM_CLUSTER_NAME")
    job_start = os.environ.get("SLURM_JOB_START_TIME", "")
    store.begin(attempt, token)
    _make_folders(run, attempt)
    facts = AttemptFacts(attempt, token, prepared, ranks, _ends_at(executor, job_id))
    write_json(run.attempt_dir(attempt) / "attempt.json", asdict(facts))
    record(
        run,
        "begin",
        attempt=attempt,
        token=token,
        job_id=job_id,
        **({"job_start": int(job_start)} if executor == "slurm" and job_start.isdecimal() else {}),
        executor=executor,
        host=socket.gethostname(),
        **({"cluster": cluster} if executor == "slurm" and cluster else {}),
        **({"restarts": own_restarts()} if own_restarts() else {}),
        node_names=list(node_names),
        gpus=_num_gpus(config, executor, ranks, len(node_names)),
        ranks=ranks,
        resumed_from=newest_step(run, config, store),
    )
    start_trackers(run, config, attempt)
    return attempt


def _check_inputs(run: RunDir, config: RunConfig, store: CheckpointStore) -> None:
    """Refuse a damaged model or traces of another run, or others than the run began with; record them."""
    try:
        check_inputs(config, by_content=True)
        now = inputs_now(run, config)
    except StateError as error:  # the same on every node
        raise MustNotGoOnError(str(error)) from None
    before = read_json(run.inputs) if run.inputs.exists() else None
    if before not in (None, now) and newest_step(run, config, store):
        changed = next((use["path"] for use in [*now, *before] if use not in before or use not in now), "")
        raise MustNotGoOnError(
            f"{run.run_id} does not go on: {changed} has changed since it began. Begin another run with it"
        )
    if now or before:
        write_json(run.inputs, now)


def check_records(run: RunDir) -> int:
    """Return the highest attempt number that is recorded or on disk.

    Raise NotTheNodeError if attempts.jsonl is damaged, or empty though attempts are on disk.
    """
    try:
        events, _ = read_run_events(run)
    except StateError as error:
        if isinstance(error.__context__, OSError):  # this node may read it wrongly
            raise
        raise NotTheNodeError(str(error)) from None
    begun = [event["attempt"] for event in events if event["event"] == "begin"]
    used, fenced = max(last_attempt_with_logs(run), *begun, 0), last_incarnation(run.checkpoints)
    # An attempt whose begin died before it was recorded keeps its number.
    used = fenced if fenced > used + 1 else used
    if used and not events:
        raise NotTheNodeError(
            f"{run.attempts} holds nothing, but attempt {used} is on disk: restore it, or "
            "`submit --resume` to go on without the history"
        )
    return used


def _refuse_what_others_may_write(run: RunDir, executor: str, job_with_payload: str | None) -> None:
    try:
        check_private(run)
        check_owned(run.path.resolve())
        if executor == "local" and run.code.is_dir():  # a job script has looked
            for name, status in walk(run.code):
                if status.st_uid not in (os.getuid(), 0):
                    raise StateError(f"{run.code / name} belongs to uid {status.st_uid}: remove it")
        if job_with_payload is not None:
            payload.check(run.path, job_with_payload)
    except StateError as error:  # the same on every node
        raise MustNotGoOnError(str(error)) from None


def read_facts(run: RunDir, attempt: int) -> AttemptFacts:
    """Return what begin wrote for the ranks of this attempt."""
    facts = read_json(run.attempt_dir(attempt) / "attempt.json", AttemptFacts)
    return AttemptFacts(**{f.name: facts[f.name] for f in fields(AttemptFacts) if f.name in facts})


def _ends_at(executor: str, job_id: str) -> float | None:
    """Return when the time limit ends the job, by time.monotonic(): this host's clock may be wrong."""
    if executor != "slurm":
        return None
    try:
        limit_at = job_state(job_id).limit_at
        return None if limit_at is None else time.monotonic() + limit_at - controller_time()
    except SlurmError:
        return None


def _record_excluded(run: RunDir, config: RunConfig, job_id: str) -> None:
    """Record the nodes this job was moved away from, and the job script's reason for each."""
    try:
        excluded = expand_nodelist(job_state(job_id).excluded)
    except SlurmError:
        return
    known = {event["node"] for event in read_run_events(run)[0] if event["event"] == "excluded"}
    for node in set(excluded) - set(expand_nodelist(config.resources.exclude or "")) - known:
        said = run.logs / f"excluded-{node}.txt"
        if not said.is_file() and (run.path / "site.sh").is_file():
            continue  # a job of sbatch/train.sh: the user's own --exclude, unknown to the run
        reason = said.read_text().strip() if said.is_file() else "it could not write into the run folder"
        print(f"{run.run_id} goes on without node {node}: {reason}", file=sys.stderr)
        record(run, "excluded", node=node, reason=reason, job_id=job_id)


def _make_folders(run: RunDir, attempt: int) -> None:
    for leftover in run.path.glob("universal-*"):  # conversions that were killed or outlived their rank
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in (run.attempt_dir(attempt), run.attempt_logs(attempt)):
        shutil.rmtree(folder, ignore_errors=True)  # left by a begin that died before it was recorded
        folder.mkdir(mode=0o700)
    latest = run.logs / "latest"
    fresh = run.logs / f".latest-{attempt}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run.attempt_logs(attempt).name)
    fresh.replace(latest)


def _num_gpus(config: RunConfig, executor: str, ranks: int, num_nodes: int) -> int:
    """Return the GPUs allocated, used or not: as Slurm reports them, else as configured for each node."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "") if executor == "slurm" else ""
    if given.isdecimal():
        return int(given) * num_nodes
    per_node = config.resources.gpus_per_node
    return ranks if per_node is None else per_node * num_nodes
