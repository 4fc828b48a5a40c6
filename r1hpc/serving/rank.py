"""Run a server as the one rank of a job: its address, its start, and its end.

outcome = serve(job)
"""

import os
import sys
import time

from r1hpc.attempt.begin import read_facts
from r1hpc.attempt.workload import Outcome, RankJob
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import parse_time
from r1hpc.config.schema.run import RunConfig
from r1hpc.serving.address import Place, make_key
from r1hpc.serving.life import Life
from r1hpc.serving.process import command_of, environment_of
from r1hpc.slurm.rank_env import RankContext, choose_port, own_address

_LOOPBACK = "127.0.0.1"


def serve(job: RankJob) -> Outcome:
    """Serve the model until a stop is requested, it is idle too long, or the time is up.

    Raises:
        UsageError: the interpreter has no vLLM.
        R1hpcError: the server failed, or this node has no address.
    """
    run, config, context = job.run, job.config, job.context
    place = _place(config, context)
    name = config.serve.model_name or run.run_id
    ends_at = _ends_at(run, config, context)

    def stop_reason() -> str:
        stop, _ = job.requests.poll()
        return job.requests.reason if stop else ""

    life = Life(
        run,
        config,
        context.attempt,
        place,
        name,
        stop_reason=stop_reason,
        seconds_left=lambda: None if ends_at is None else ends_at - time.monotonic(),
        lead_s=0.0 if _is_local(context) else config.resources.signal_lead_s or 0.0,
        beat=job.watchdog.beat,
    )
    command = command_of(config, [sys.executable], place, name)
    ended = life.live(command, environment_of(os.environ, run.code, make_key(run)))
    return Outcome(ended.is_finished, reason=ended.reason)


def _place(config: RunConfig, context: RankContext) -> Place:
    host = config.serve.host or (
        _LOOPBACK if _is_local(context) else own_address(os.environ, context.node_name)
    )
    return Place(host, config.serve.port or _free_port(), context.node_name)


def _free_port() -> int:
    """Return a port that is free now; vLLM binds it before loading the model."""
    with choose_port() as listener:
        return int(listener.getsockname()[1])


def _ends_at(run: RunDir, config: RunConfig, context: RankContext) -> float | None:
    """Return when the time limit ends the job, by time.monotonic(); without Slurm nobody else enforces it."""
    if not _is_local(context):
        return read_facts(run, context.attempt).ends_at
    limit_s = parse_time(config.resources.time or "0")  # 0 is no limit, as in Slurm
    return time.monotonic() + limit_s if limit_s else None


def _is_local(context: RankContext) -> bool:
    return context.master_host == _LOOPBACK
