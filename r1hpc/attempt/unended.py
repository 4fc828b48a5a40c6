"""The end of an attempt that could not write its own: killed, or finished by ranks whose supervisor was gone.

    close_unended(run, config, job_id)       # the next `begin` writes what is missing

Of a finished run there is no next one: attempt.state says what its last attempt came to.
"""

import os
import time
from dataclasses import replace

from r1hpc.attempt.cause import Evidence, SchedulerView, decide
from r1hpc.attempt.outcome import read_outcomes
from r1hpc.attempt.slurm_records import learn
from r1hpc.attempt.state import WITHOUT_SUPERVISOR
from r1hpc.base.rundir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema import RunConfig
from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sacct import sacct_records
from r1hpc.telemetry.attempts import Attempt, Cause, read_history, record
from r1hpc.telemetry.metrics import last_steps, loaded_step

_FAILURES = (Cause.crash, Cause.hang, Cause.oom, Cause.unknown)


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
    if cause is Cause.finished:
        detail = WITHOUT_SUPERVISOR
    elif cause is Cause.crash and not evidence.outcomes and not view.states:
        cause, detail = Cause.unknown, "ended without a record"
    record(
        run,
        "end",
        attempt=last.attempt,
        cause=cause.value,
        detail=detail,
        exit_status=None,
        **steps_for_the_end(run, config, last.attempt, cause),
        requeued=not cause.is_final,
        inferred=True,
        ended=ended or _last_sign_of_life(run, last.attempt),
    )


def steps_for_the_end(run: RunDir, config: RunConfig, attempt: int, cause: Cause) -> dict[str, int | None]:
    """What the `end` of an attempt says of its checkpoints.

    An attempt that could not load the newest one went on from an older one: what it committed itself is its
    progress, though a newer folder is still there. A server that failed has made none: one that dies of a
    request that is asked again would come back for ever.
    """
    store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
    if config.stage == "serve" and cause in _FAILURES:
        answered = newest_step(run, config, store)
        return {"resumed_from": answered, "last_committed_step": answered}
    loaded = loaded_step(run, attempt)
    if loaded is None:
        return {"last_committed_step": newest_step(run, config, store)}
    own = [each.step for each in store.list() if each.manifest.attempt == attempt]
    return {"resumed_from": loaded, "last_committed_step": max(own, default=loaded)}


def newest_step(run: RunDir, config: RunConfig, store: CheckpointStore) -> int | None:
    """The newest committed step, unverified, or how many parts are done; None before the first.

    What a server has answered is done once it is on record.
    """
    if config.stage == "serve":
        return next((step.global_step for step in last_steps(run, 1)), None)
    found = store.list()
    if found:
        return found[0].step
    return len(run.all_parts) or None


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
        # Slurm writes whole seconds: an attempt killed in the second of its begin seems to end before it.
        if mine and mine[-1].end is not None and mine[-1].end >= int(last.start):
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
