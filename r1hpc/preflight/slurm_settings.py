"""Check Slurm's settings for those that cost a long run its requeue, its warning or its time.

judge_cluster(probe_cluster(partition="gpu"), slurm_is_here=True)
"""

from r1hpc.base.units import format_duration, format_time
from r1hpc.plan.save_time import ends_jobs
from r1hpc.preflight.findings import SiteFinding, fail, ok, unknown, warn
from r1hpc.slurm.probe import ClusterFacts

_SHORT_S = 3600
_SHORT_WARNING_S = 30


def judge_cluster(facts: ClusterFacts, slurm_is_here: bool) -> list[SiteFinding]:
    """Judge whether Slurm answers, the partition's time limit, preemption and requeue."""
    if not slurm_is_here:
        return [unknown("Slurm", "this machine belongs to no cluster", "run it on a login node of one")]
    if not facts.reachable:
        said = facts.unknown[0] if facts.unknown else "no answer"
        return [fail("Slurm", said.splitlines()[0], "try again; if it stays so, ask the administrators")]
    return [
        ok("Slurm", f"{facts.version}, partition {facts.partition}, QOS {facts.qos or 'not known'}"),
        _judge_time(facts),
        _judge_preemption(facts),
        _judge_requeue(facts),
        *(unknown("Slurm", each.splitlines()[0]) for each in facts.unknown),
    ]


def _judge_time(facts: ClusterFacts) -> SiteFinding:
    if facts.max_time_s is None:
        return ok("time limit", f"partition {facts.partition} has none, or does not say")
    detail = f"partition {facts.partition} allows {format_time(facts.max_time_s)}"
    if facts.max_time_s < _SHORT_S:
        fix = (
            "start-up and the last save come out of that each time: take a partition with more (--partition)"
        )
        return warn("time limit", detail, fix)
    return ok("time limit", detail)


def _judge_preemption(facts: ClusterFacts) -> SiteFinding:
    mode = facts.preempt_mode
    if mode is None:
        return unknown("preemption", "Slurm does not say how this partition and QOS preempt")
    if mode.startswith("OFF"):
        return ok("preemption", f"nobody preempts partition {facts.partition}, QOS {facts.qos or 'default'}")
    if not ends_jobs(mode):
        # SUSPEND ignores GraceTime and releases no GRES, slurm.conf(5).
        return ok(
            "preemption",
            f"{mode}: a preempted run is paused in place and continues later. It keeps its nodes, its GPUs "
            "and what is in their memory, and needs no checkpoint. The pause counts neither towards the time "
            "limit nor towards train.hang_timeout_s",
        )
    # With a GraceTime of 0 only KillWait lies between the signal and the end, slurm.conf(5).
    window = facts.grace_s or facts.kill_wait_s
    detail = f"{mode}, {format_duration(window)} from the signal to the end" if window else mode
    if window is not None and window < _SHORT_WARNING_S:
        fix = "save often (checkpoint.save_every): a save may not fit; or take a QOS with a longer GraceTime"
        return warn("preemption", detail, fix)
    return ok("preemption", detail)


def _judge_requeue(facts: ClusterFacts) -> SiteFinding:
    if facts.job_requeue is False:
        fix = "none needed: r1hpc submits with --requeue, or a follow-up job where that is refused"
        return warn("requeue", "JobRequeue=0: Slurm requeues no job that does not ask for it", fix)
    most = facts.max_batch_requeue
    if most is None:
        return ok("requeue", "allowed; MaxBatchRequeue is not known")
    # Seen with Slurm 24.11; _job_complete() and _handle_requeue_limit() in src/slurmctld/job_mgr.c.
    if most <= 1:
        detail = (
            f"MaxBatchRequeue={most}: Slurm holds a job (REQUEUE_HOLD) at its first failed launch or exit "
            "inside the grace time. r1hpc's own requeues do not count, so a preempted run does continue. But "
            "the exit of a finished run that was preempted earlier counts too: its job stays held, and the "
            "next stage of a chain waits for it"
        )
        fix = (
            "scancel a job in REQUEUE_HOLD; then submit its chain again, or the run with --resume if it is "
            "not finished. Only an operator can release it; ask for MaxBatchRequeue=5, Slurm's default"
        )
        return warn("requeue", detail, fix)
    detail = (
        f"allowed; MaxBatchRequeue={most}: Slurm holds a job after {most} failed launches or exits inside "
    )
    return ok("requeue", f"{detail}the grace time, which r1hpc's own requeues are not")
