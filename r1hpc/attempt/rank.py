"""One rank of an attempt: meet the others, train, and leave a record of how it ended.

`run_rank(run_dir)` is where every way of starting ends: submitit's pickle, `srun python -m r1hpc.launch
rank`, the local supervisor. torch is imported only after the signal handlers stand.
"""

import errno
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from r1hpc.attempt.begin import read_facts
from r1hpc.attempt.outcome import FAILED, FINISHED, HANG, STOPPED, RankOutcome, write_outcome
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import check_owned, read_json, write_json
from r1hpc.base.rundir import RunDir, open_run
from r1hpc.config.load import read
from r1hpc.config.schema import RunConfig
from r1hpc.data.errors import DatasetMismatchError
from r1hpc.slurm.env import RankContext, choose_port, current, job_end_time, network_interface_to
from r1hpc.telemetry.attempts import Cause, read_history, seconds_left
from r1hpc.telemetry.sampler import GpuSampler
from r1hpc.train import peers
from r1hpc.train.errors import TrainError
from r1hpc.train.stop import Clock, StopRequests
from r1hpc.train.watchdog import Watchdog

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from r1hpc.train.loop import Outcome

_RENDEZVOUS_TIMEOUT_S = 600.0
_FILE_SYSTEM_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run_rank(run_dir: str) -> NoReturn:
    """Run this process's rank of the attempt in $R1HPC_ATTEMPT.

    Leaves the process by itself once its work is done: for a function that returns, submitit writes a
    result, which nobody reads here, and trips over a half-written one that an earlier kill left behind; and
    threads of torch and DeepSpeed that are still about can abort an interpreter that unwinds.
    """
    run = open_run(run_dir)
    context = current(os.environ)
    check_owned(run.config)
    config = read(run.config)
    requests = StopRequests(run, context.rank, _clock(run, config))
    requests.install()
    watchdog = Watchdog(
        config.train.hang_timeout_s,
        lambda problem: _leave_outcome(
            run, context, RankOutcome(context.rank, HANG, context.node_name, detail=problem)
        ),
    )
    watchdog.start()
    sampler = _start_sampler(run, config, context)
    try:
        outcome = _train(run, config, context, requests, watchdog)
    except BaseException as error:
        _leave_outcome(run, context, _failure(context, error))
        if isinstance(error, R1hpcError):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in _FILE_SYSTEM_REFUSES:
            print(f"error: {error.strerror}: {error.filename or run.path}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by unwinding: destructors of a broken process group can wait for dead peers.
        os._exit(1)
    finally:
        if sampler is not None:
            sampler.stop()
    watchdog.stop()
    _report(run, context, outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _clock(run: RunDir, config: RunConfig) -> Clock:
    """When to save first, and when the run's own GPU-hours are used up."""
    now, wall = time.monotonic(), time.time()
    end = job_end_time(os.environ)
    first = None if end is None else now + max(0.0, end - wall) / 2
    left = seconds_left(read_history(run), config.limits.max_gpu_hours, wall)
    return Clock(first_save_at=first, stop_at=None if left is None else now + left)


def _train(
    run: RunDir, config: RunConfig, context: RankContext, requests: StopRequests, watchdog: Watchdog
) -> "Outcome":
    facts = read_facts(run, context.attempt)
    use_gpu = bool(config.resources.gpus_per_node)
    store = _rendezvous(run, config, context, facts.token, watchdog)
    watchdog.beat("loading the libraries")
    # Deferred: seconds of imports that must not stand between a signal and its handler.
    from r1hpc.train import distributed

    distributed.choose_accelerator(use_gpu)  # before `loop` imports DeepSpeed
    from r1hpc.train import loop, stages

    watchdog.beat("joining the other ranks")
    group = distributed.join(
        context.rank,
        context.local_rank,
        context.world_size,
        store,
        use_gpu=use_gpu,
        waits=watchdog.waiting,
    )
    job = loop.Job(
        config=config,
        run=run,
        group=group,
        attempt=context.attempt,
        token=facts.token,
        node=context.node_name,
        dataset_path=Path(facts.dataset_path) if facts.dataset_path else None,
        requests=requests,
        watchdog=watchdog,
    )
    outcome = stages.run(job)
    distributed.leave()
    return outcome


def _rendezvous(
    run: RunDir, config: RunConfig, context: RankContext, token: str, watchdog: Watchdog
) -> "Store":
    """A TCPStore on a port that rank 0 found free and already holds; the others read it from a file.

    The socket is bound before its number is written, so nobody can take the port in between. The attempt's
    token is checked through the store: a stranger's store, or one of an earlier attempt, is refused. A second
    connection carries the ranks' signs of life.
    """
    from r1hpc.train.distributed import make_store

    store: Store
    place = run.attempt_dir(context.attempt) / "rendezvous.json"
    if context.rank == 0:
        listener = choose_port()
        host = context.master_host
        port = listener.getsockname()[1]
        store = make_store("localhost", port, context.world_size, listener=listener)
        store.set("r1hpc/token", token)
        peers.prepare(store, context.world_size)
        write_json(place, {"host": host, "port": port, "token": token})
        host = "localhost"
    else:
        meeting = _wait_for(place, token, watchdog)
        host, port = meeting["host"], int(meeting["port"])
        store = make_store(host, port, context.world_size, listener=None)
        if store.get("r1hpc/token") != token.encode():
            raise R1hpcError(f"{host}:{port} answers, but not for this attempt; it belongs to another run")
    if context.world_size > 1:
        own = make_store(host, port, context.world_size, listener=None)
        timeout_s = config.train.hang_timeout_s
        watchdog.hear(peers.Peers(own, context.rank, context.world_size, timeout_s))
    _name_interface(config, context)
    return store


def _name_interface(config: RunConfig, context: RankContext) -> None:
    """Tell gloo and NCCL which interface leads to the other nodes; their own guess may be a private one."""
    if config.cluster.network_interface is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[variable] = config.cluster.network_interface
        return
    interface = network_interface_to(context.peer_host)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":  # NCCL within one node uses shared memory and NVLink, and finds its own way
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": not eth10 for eth1


def _wait_for(place: Path, token: str, watchdog: Watchdog) -> dict[str, str]:
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT_S
    while time.monotonic() < deadline:
        watchdog.beat("waiting for rank 0")  # not a hang: the deadline ends it, with a message of its own
        if place.exists():
            meeting: dict[str, str] = read_json(place)
            if meeting["token"] == token:
                return meeting
        time.sleep(0.1)
    raise R1hpcError(
        f"rank 0 did not write {place} within {_RENDEZVOUS_TIMEOUT_S:.0f} s; see the log of rank 0"
    )


def _start_sampler(run: RunDir, config: RunConfig, context: RankContext) -> GpuSampler | None:
    """One NVML sampler per node, on its first rank."""
    if not config.monitor.enabled or context.local_rank != 0:
        return None
    sampler = GpuSampler(
        run.gpu_metrics(context.node_name), context.node_name, context.attempt, config.monitor.period_s
    )
    sampler.start()
    return sampler


def _report(run: RunDir, context: RankContext, outcome: "Outcome") -> None:
    kind = FINISHED if outcome.finished else STOPPED
    left = RankOutcome(
        context.rank, kind, context.node_name, outcome.global_step, outcome.reason, kept=outcome.kept
    )
    _leave_outcome(run, context, left)
    if context.rank != 0:
        return
    if outcome.finished:
        write_json(run.finished, {"global_step": outcome.global_step, "time": time.time()})
    what = "finished" if outcome.finished else f"stopped by {outcome.reason or 'another rank'}"
    print(f"{what} after step {outcome.global_step}", flush=True)


def _leave_outcome(run: RunDir, context: RankContext, outcome: RankOutcome) -> None:
    try:
        write_outcome(run, context.attempt, outcome)
    except OSError as error:  # a full disk must not hide why the rank failed
        print(f"could not write the outcome of rank {context.rank}: {error}", file=sys.stderr)


def _failure(context: RankContext, error: BaseException) -> RankOutcome:
    first = (str(error).splitlines() or [""])[0]
    return RankOutcome(
        context.rank,
        FAILED,
        context.node_name,
        cause=_cause_of(error).value,
        detail=f"{type(error).__name__}: {first}"[:500],
    )


def _cause_of(error: BaseException) -> Cause:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Cause.oom
    # Configuration does not mend itself. A full disk, a slow node, a bad read can: those are crashes.
    if isinstance(error, (UsageError, TrainError, DatasetMismatchError)):
        return Cause.refused
    return Cause.crash
