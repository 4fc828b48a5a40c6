"""A user's side of the cluster: submit, wait, account, preempt.

job = cluster.submit("srun sleep 600", "--qos=scavenger", "-N2", "--gres=gpu:4")
cluster.wait_job(job, {"RUNNING"})
cluster.preempt(job)
cluster.wait_restarts(job, 1)
[record["State"] for record in cluster.sacct(job)]      # ['PREEMPTED', 'RUNNING']
"""

import os
import re
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.packages import PATH
from tests.cluster.processes import ClusterError, until

_SACCT_FIELDS = (
    "JobID,JobName,State,ExitCode,Restarts,NNodes,NodeList,AllocTRES,QOS,Partition,Account,"
    "Submit,Eligible,Start,End,ElapsedRaw,Reason"
)
DONE = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE"}
)


class Client:
    """Commands of Slurm against one slurm.conf."""

    def __init__(self, slurm_conf: Path) -> None:
        self.slurm_conf = slurm_conf

    def env(self, **extra: str) -> dict[str, str]:
        """The caller's environment without any other Slurm's variables, plus what the commands need."""
        foreign = ("SLURM_", "SBATCH_", "SALLOC_", "SACCT_", "SQUEUE_", "SINFO_", "SRUN_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{kept.get('PATH', '')}:{PATH}".lstrip(":")
        return {**kept, "PATH": path, "SLURM_CONF": str(self.slurm_conf), **extra}

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 60,
        check: bool = True,
        cwd: Path | None = None,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with `env(**env)`.

        Raises:
            ClusterError: it took longer than `timeout` seconds, or exited non-zero and `check` is on.
        """
        return self._run(argv, timeout, check, cwd, env)

    def submit(self, script: str, *options: str, cwd: Path | None = None, **env: str) -> int:
        """sbatch a bash script body (no #! line needed) and return the job id."""
        argv = ["sbatch", "--parsable", *options]
        out = self._run(argv, 30, True, cwd, env, text=f"#!/bin/bash\n{script}\n").stdout
        return int(out.strip().split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """`scontrol show job` as a dict: JobState, Restarts, Reason, NodeList, StartTime, ..."""
        text = self._ask(["scontrol", "--oneliner", "show", "job", str(job_id)]).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job_id: int) -> str:
        """JobState as the controller has it now."""
        return self.job(job_id)["JobState"]

    def nodes(self) -> dict[str, str]:
        """Node name -> state as sinfo says it, e.g. {'r1n1': 'idle', 'r1n2': 'down*'}."""
        text = self._ask(["sinfo", "--noheader", "-N", "-o", "%N %T", "-p", "main"]).stdout
        return dict(line.split() for line in text.splitlines())

    def node_list(self, job_id: int) -> list[str]:
        """Names of the nodes a job has."""
        names = self._ask(["scontrol", "show", "hostnames", self.job(job_id)["NodeList"]]).stdout
        return names.split()

    def sacct(self, job_id: int, *, steps: bool = False) -> list[dict[str, str]]:
        """Every accounting record of a job, each attempt of it (-D), oldest first; steps only when asked."""
        argv = ["sacct", "-D", "-P", "-n", "-j", str(job_id), "-o", _SACCT_FIELDS, *([] if steps else ["-X"])]
        names = _SACCT_FIELDS.split(",")
        lines = self._ask(argv).stdout.splitlines()
        return [dict(zip(names, line.split("|"), strict=True)) for line in lines]

    def wait_job(self, job_id: int, states: Collection[str] = DONE, timeout: float = 60) -> str:
        """Wait until the controller says one of `states`; return it."""
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.state(job_id)
            return seen in states

        try:
            until(f"job {job_id} in {sorted(states)}", reached, timeout)
        except ClusterError as error:
            raise ClusterError(f"{error}\nit is {self.job(job_id)}") from None
        return seen

    def wait_restarts(self, job_id: int, count: int, timeout: float = 90) -> float:
        """Wait until the job runs (or has run) after at least `count` requeues; return the seconds waited."""

        def restarted() -> bool:
            job = self.job(job_id)
            return int(job["Restarts"]) >= count and job["JobState"] not in {"PENDING", "COMPLETING"}

        return until(f"restart {count} of job {job_id}", restarted, timeout)

    def preempt(self, job_id: int, seconds: int = 2) -> int:
        """Submit an urgent job that needs every GPU of the victim's nodes for `seconds`; return its id."""
        nodes = self.node_list(job_id)
        return self.submit(
            f"sleep {seconds}",
            "--job-name=preemptor",
            "--qos=urgent",
            "--time=5",
            "--exclusive",
            "--mem=1000",
            "--output=/dev/null",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            "--gres=gpu:4",
        )

    @contextmanager
    def drained(self, node: str) -> Iterator[None]:
        """No job begins on a node meanwhile; one that runs there goes on."""
        name = f"nodename={node}"
        self.run(["scontrol", "update", name, "state=drain", "reason=test"])
        try:
            yield
        finally:
            self.run(["scontrol", "update", name, "state=resume"])

    def cancel(self, *job_ids: int) -> None:
        """scancel; a job that has ended already is fine."""
        self._patiently(["scancel", *map(str, job_ids)])

    def clear(self, timeout: float = 90) -> None:
        """Cancel every job of the cluster and wait until none is left, not even completing.

        Again and again, for a script that answers the end of its steps by `scontrol requeue` brings a job
        back that was cancelled while it ran.
        """

        def empty() -> bool:
            queue = self._ask(["squeue", "--noheader", "--states=PD,R,CG,S,CF", "--format=%A"]).stdout.split()
            if queue:
                self.cancel(*map(int, queue))
            return not queue

        until("an empty queue", empty, timeout)

    def _ask(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """The answer of a command that only reads."""
        done = self._patiently(argv)
        if done.returncode:
            raise ClusterError(f"{' '.join(argv)} exited {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def _patiently(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command that may be run twice, again where a daemon was too slow to answer."""
        done = self.run(argv, check=False)
        for _ in range(3):
            if "Socket timed out" not in done.stderr:
                break
            done = self.run(argv, check=False)
        return done

    def _run(
        self,
        argv: Sequence[str],
        timeout: float,
        check: bool,
        cwd: Path | None,
        env: dict[str, str],
        text: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        stdin = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=self.env(**env), **stdin
            )
        except subprocess.TimeoutExpired as error:
            output = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
            raise ClusterError(f"no end after {timeout:.0f} s: {' '.join(argv)}\n{output}") from None
        if check and done.returncode:
            message = f"{' '.join(argv)} exited {done.returncode}\n{done.stdout}{done.stderr}"
            raise ClusterError(message.rstrip())
        return done
