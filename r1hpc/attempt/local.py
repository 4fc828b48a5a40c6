"""Run attempts on this machine, one after the other, without Slurm (`launch local`).

It does what the batch script does: begin, one process per rank, end; again while `end` asks for it. SIGUSR2
to the supervisor is a preemption (save, then the next attempt). SIGTERM means: save, then end for good.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

from r1hpc.attempt.begin import begin
from r1hpc.attempt.end import Next, end
from r1hpc.attempt.may_begin import NotTheNodeError, record_not_begun
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import read
from r1hpc.config.schema.cluster import ResourcesConfig
from r1hpc.plan.topology.batch import ranks_per_node
from r1hpc.slurm.rank_env import played_nodes
from r1hpc.telemetry.records.attempts import Cause

# As srun --kill-on-bad-exit, but the others have time to commit their writes and to record their end.
_AFTER_BAD_EXIT_S = 15.0


class Supervisor:
    """All attempts of one run on this machine."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._config = read(run.config)
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._stopping = False
        self._job_id = f"local-{os.getpid()}"

    def supervise(self) -> int:
        """Run until the run is over or a stop is requested; 0 unless it failed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        while True:
            resources = self._config.resources
            world_size = resources.nodes * ranks_per_node(self._config, resources.gpus_per_node or 0)
            names = played_nodes(resources.nodes)
            try:
                attempt = begin(self._run, "local", self._job_id, names, world_size)
            except NotTheNodeError as error:  # here no held job shows the reason
                record_not_begun(self._run, self._job_id, Cause.cluster, str(error))
                raise
            if attempt is None:
                return 0
            print(f"{self._run.run_id}: attempt {attempt} begins", file=sys.stderr, flush=True)
            # A stop was requested while begin was building a dataset: start no rank.
            status = 0 if self._stopping else self._run_ranks(attempt, world_size)
            ended = end(self._run, attempt, status)
            if ended.next is Next.over or self._stopping:
                return ended.exit_status

    def _run_ranks(self, attempt: int, world_size: int) -> int:
        self._ranks = [self._start(attempt, rank, world_size) for rank in range(world_size)]
        bad_since: float | None = None
        # Poll every rank each time: an unpolled one stays a zombie without a return code.
        while None in [rank.poll() for rank in self._ranks]:
            time.sleep(0.1)
            if bad_since is None and any(rank.returncode for rank in self._ranks):
                bad_since = time.monotonic()
            if bad_since is not None and time.monotonic() - bad_since > _AFTER_BAD_EXIT_S:
                for rank in self._ranks:
                    rank.kill()
        statuses = [r.returncode if r.returncode >= 0 else 128 - r.returncode for r in self._ranks]
        return max(statuses, default=0)  # as srun: the highest, so that a signal outranks its echo

    def _start(self, attempt: int, rank: int, world_size: int) -> subprocess.Popen[bytes]:
        resources = self._config.resources
        environment = {
            **os.environ,
            **self._config.cluster.environment,
            "R1HPC_ATTEMPT": str(attempt),
            "R1HPC_LOCAL_RANK": str(rank),
            "R1HPC_LOCAL_WORLD_SIZE": str(world_size),
            "R1HPC_LOCAL_NODE_COUNT": str(resources.nodes),
            "R1HPC_LOCAL_JOB_ID": self._job_id,
            **gpus_of_played_node(resources, rank, os.environ),
        }
        # On a small machine two ranks with several threads each slow one another down 7 to 27 times.
        environment.setdefault("OMP_NUM_THREADS", str(resources.cpus_per_task or 1))
        command = [sys.executable, "-u", "-m", "r1hpc.launch", "rank", str(self._run.path)]
        with self._run.rank_log(attempt, rank).open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = self._stopping or number != signal.SIGUSR2
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)


def gpus_of_played_node(resources: ResourcesConfig, rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES of a rank: simulated nodes share this machine's GPUs out."""
    per_node = resources.gpus_per_node
    if not per_node or resources.nodes == 1:
        return {}
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    all_of_them = listed.split(",") if listed else [str(i) for i in range(resources.nodes * per_node)]
    first = rank // per_node * per_node
    return {"CUDA_VISIBLE_DEVICES": ",".join(all_of_them[first : first + per_node])}
