"""Start a training rank: meet the other ranks, set up torch and DeepSpeed, run the stage.

    outcome = run_rank(job)

Every rank calls it through train/workload.py. torch is first imported here, since that takes seconds:
attempt/rank.py has set the signal handlers before.
"""

import os
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from r1hpc.attempt.control import heartbeats
from r1hpc.attempt.control.watchdog import Watchdog
from r1hpc.attempt.workload import Outcome, RankJob
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.rank_env import RankContext, await_meeting, choose_port, network_interface_to

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PROGRAMS = {
    "pretrain": "r1hpc.train.supervised.supervised:pretrain",
    "sft": "r1hpc.train.supervised.sft:run",
    "rl": "r1hpc.train.rl.rl:run",
    "rollout": "r1hpc.train.rollout.worker:run",
    "traces": "r1hpc.train.generate.generate:traces",
    "generate": "r1hpc.train.generate.generate:generate",
    "evaluate": "r1hpc.train.generate.generate:evaluate",
}
"""By name: a stage's imports (tasks, readers, peft) are paid for only if it runs."""


def run_rank(ranked: RankJob) -> Outcome:
    run, config, context, watchdog = ranked.run, ranked.config, ranked.context, ranked.watchdog
    use_gpu = bool(config.resources.gpus_per_node)
    store = _rendezvous(run, config, context, ranked.token, watchdog)
    watchdog.load("loading the libraries")
    # Deferred: seconds of imports must not delay the signal handlers.
    from r1hpc.train.parallel import distributed

    distributed.choose_accelerator(use_gpu)  # before `loop` imports DeepSpeed
    watchdog.load("loading DeepSpeed")
    if config.train.deterministic:
        distributed.be_deterministic()
    distributed.let_memory_grow()
    if config.stage != "pretrain":
        distributed.attend_at_any_length()
    from r1hpc.train.loop.session import Job

    watchdog.beat("joining the other ranks")
    group = distributed.join(
        context.rank,
        context.local_rank,
        context.world_size,
        store,
        use_gpu=use_gpu,
        waits=watchdog.waiting,
        beat=watchdog.still,
    )
    job = Job(
        config=config,
        run=run,
        group=group,
        attempt=context.attempt,
        token=ranked.token,
        node=context.node_name,
        dataset_path=Path(ranked.prepared) if ranked.prepared else None,
        requests=ranked.requests,
        watchdog=watchdog,
    )
    outcome: Outcome = resolve_name(_PROGRAMS[config.stage])(job)
    distributed.leave()
    return outcome


def _rendezvous(
    run: RunDir, config: RunConfig, context: RankContext, token: str, watchdog: Watchdog
) -> "Store":
    """Return a TCPStore on a free port that rank 0 holds already; the others read the port from a file.

    The socket is bound before its number is written, so nobody can take the port in between. The attempt's
    token is checked through the store, so a store of a stranger or an earlier attempt is refused. A second
    connection carries the ranks' heartbeats.
    """
    from r1hpc.train.parallel.distributed import connected_again, make_store

    store: Store
    place = run.attempt_dir(context.attempt) / "rendezvous.json"
    if context.rank == 0:
        listener = choose_port()
        port = listener.getsockname()[1]
        store = make_store("localhost", port, context.world_size, listener=listener)
        store.set("r1hpc/token", token)
        heartbeats.prepare(store, context.world_size)
        write_json(place, {"host": context.master_host, "port": port, "token": token})
    else:
        meeting = await_meeting(place, token, watchdog.beat)
        host, port = meeting["host"], meeting["port"]
        store = make_store(host, port, context.world_size, listener=None)
        if store.get("r1hpc/token") != token.encode():
            raise R1hpcError(f"{host}:{port} answers, but not for this attempt; it belongs to another run")
    if context.world_size > 1:
        own, timeout_s = connected_again(store), config.train.hang_timeout_s
        watchdog.hear(heartbeats.Peers(own, context.rank, context.world_size, timeout_s))
    _name_interface(config, context)
    return store


def _name_interface(config: RunConfig, context: RankContext) -> None:
    """Tell gloo and NCCL which interface leads to the other nodes; they may guess a private one."""
    if config.cluster.network_interface is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[variable] = config.cluster.network_interface
        return
    interface = network_interface_to(context.peer_host)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":  # within one node NCCL uses shared memory and NVLink
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": not eth10 for eth1
