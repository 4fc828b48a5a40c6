"""Runs whose ranks only wait for a signal: Slurm, the job script, `begin` and `end` are real.

run = LightRun(tmp_path, "a", cluster)
run.submit("--qos=scavenger", R1HPC_LIGHT_SAVE_S="3")
cluster.preempt(run.job); run.wait_attempt(2); run.wait_over()

An attempt takes three seconds instead of the twenty of one that loads torch. The rank waits until it is
signalled, and in the second attempt, or in the one that R1HPC_LIGHT_LAST names, finishes the run.

    R1HPC_LIGHT_SAVE_S      seconds from the signal until the rank leaves
    R1HPC_LIGHT_STARTED_S   seconds that the last attempt takes
    R1HPC_LIGHT_DEAF        the rank finishes whatever it hears, as one that has taken its last step
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from r1hpc.attempt.state.cause import FINISHED, STOPPED, RankOutcome, write_outcome
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.slurm.script import Script, render
from r1hpc.telemetry.records.attempts import Attempt, read_history, record
from tests.cluster import Cluster
from tests.runs import wait_attempt, wait_over, wait_until

_CHECKOUT = Path(__file__).resolve().parent.parent
_LAUNCH = """\
import sys
from tests.light_runs import be_a_rank
if sys.argv[1] == "rank":
    be_a_rank(sys.argv[2])
from r1hpc.base.cli import run_command
from r1hpc.real_launch import main
run_command(main)
"""


class LightRun:
    """One run of one rank on one node, its folder made by hand."""

    def __init__(
        self, root: Path, name: str, cluster: Cluster, *, settings: Sequence[str] = (), **options: str
    ) -> None:
        """`settings`: KEY=VALUE, beside those of a stage that reads no shards."""
        self.cluster = cluster
        self.run = RunDir(root / name)
        self.job = 0
        self.run.create()
        self.run.code.mkdir()
        (self.run.code / "tests").symlink_to(_CHECKOUT / "tests")
        (self.run.code / "r1hpc").mkdir()
        for part in (_CHECKOUT / "r1hpc").iterdir():
            name = "real_launch.py" if part.name == "launch.py" else part.name
            (self.run.code / "r1hpc" / name).symlink_to(part)
        (self.run.code / "r1hpc" / "launch.py").write_text(_LAUNCH)
        words = ["stage=traces", "resources.gpus_per_node=0", *settings]
        load.save(load.load(None, words), self.run.config)
        self.write_script(**options)

    def write_script(self, patience: str | None = None, setup: Sequence[str] = (), **options: str) -> None:
        """job.sh, as `submit` renders it.

        Args:
            patience: seconds between the tries of `begin`, in place of those that add up to two minutes.
            setup: the profile's lines of shell.
        """
        chosen = {
            "job-name": self.run.run_id,
            "nodes": "1",
            "time": "5",
            "requeue": "",
            "signal": "USR2@30",
            "chdir": str(self.run.path),
            "output": "/dev/null",
            **options,
        }
        text = render(Script(self.run.path, (sys.executable,), 1, chosen, setup, by_submitit=False))
        if patience is not None:
            assert "2 5 10 20 30 30 30" in text
            text = text.replace("2 5 10 20 30 30 30", patience)
        self.run.script.write_text(text)

    def submit(self, *options: str, **env: str) -> int:
        """sbatch job.sh, and put it on record; the job's id."""
        asked = time.time()
        argv = ["sbatch", "--parsable", *options, str(self.run.script)]
        environment = self.cluster.env(**env)
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True, timeout=60)
        self.job = int(done.stdout)
        record(self.run, "submitted", time=asked, executor="slurm", job_id=str(self.job))
        return self.job

    @property
    def attempts(self) -> list[Attempt]:
        return list(read_history(self.run).attempts)

    @property
    def log(self) -> str:
        """What the job script has printed."""
        return "".join(path.read_text() for path in sorted(self.run.logs.glob("slurm-*.out")))

    def wait_rank(self, attempt: int, timeout_s: float = 60) -> None:
        """Until the rank of an attempt listens."""
        up = self.run.attempt_dir(attempt) / "listens"
        wait_until(f"rank of attempt {attempt}", up.exists, timeout_s, self.run)

    def wait_attempt(self, attempt: int, timeout_s: float = 90) -> None:
        wait_attempt(self.run, attempt, timeout_s)

    def wait_log(self, words: str, count: int = 1, timeout_s: float = 60) -> None:
        wait_until(repr(words), lambda: self.log.count(words) >= count, timeout_s, self.run)

    def wait_over(self, timeout_s: float = 120) -> list[Attempt]:
        return wait_over(self.run, timeout_s)


def be_a_rank(run_dir: str) -> NoReturn:
    """The rank's part, as `launch rank` would do it."""
    run, attempt = RunDir(run_dir), int(os.environ["R1HPC_ATTEMPT"])
    heard: list[str] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda n, _: heard.append(signal.Signals(n).name))
    (run.attempt_dir(attempt) / "listens").touch()
    is_last = attempt >= int(os.environ.get("R1HPC_LIGHT_LAST", "2"))
    started_s = float(os.environ.get("R1HPC_LIGHT_STARTED_S", "0"))
    done_at = time.monotonic() + (started_s if is_last else 600)
    deaf = "R1HPC_LIGHT_DEAF" in os.environ
    while (deaf or not heard) and time.monotonic() < done_at:
        time.sleep(0.05)
    node, rank = os.environ["SLURMD_NODENAME"], int(os.environ.get("SLURM_PROCID", "0"))
    if heard and not deaf:
        leave_at = time.monotonic() + float(os.environ.get("R1HPC_LIGHT_SAVE_S", "0"))
        while time.monotonic() < leave_at:
            time.sleep(0.05)
        write_outcome(run, attempt, RankOutcome(rank, STOPPED, node, 1, heard[0]))
    else:
        write_outcome(run, attempt, RankOutcome(rank, FINISHED, node, 1))
        write_json(run.finished, {"global_step": 1, "time": time.time()})
    os._exit(0)
