"""Disturb the same training job under six ways of going on; print what each lost.

    python -m benchmarks.faults --seeds 2 --out DIR [--faults kill node]    # as root: it starts its own Slurm

A cell is one fault with one seed: all arms run side by side, each on its own node, and each is struck when
its record shows the cell's step. DIR/results.jsonl has a line for each arm of a cell; a later call with the
same DIR skips the cells that are there.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.arms import CHECKOUT, LEGEND, Job, causes, submit
from benchmarks.faults.jobs.small import SAVE_EVERY
from benchmarks.faults.kinds import FAULTS, Fault
from benchmarks.faults.table import measured, table, twin_of
from tests.cluster import Cluster, ClusterError
from tests.cluster.processes import until

_LIMIT_S = 420.0
_FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


def main() -> None:
    """Run each cell that has no result yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.cell:
        run_cell(args.cell[0], int(args.cell[1]), out)
        return
    for arm in LEGEND:
        twin_of(out, arm)
    box = [sys.executable, "-m", "tests.cluster", "box", sys.executable, "-m", "benchmarks.faults"]
    for seed in range(args.seeds):
        for fault in args.faults:
            if any((row["fault"], row["seed"]) == (fault, seed) for row in rows_of(out)):
                continue
            argv = [*box, "--out", str(out), "--cell", fault, str(seed)]
            if subprocess.run(argv, cwd=CHECKOUT).returncode:
                print(f"{fault} with seed {seed}: no result", file=sys.stderr)
    print(table(rows_of(out)))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_cell(name: str, seed: int, out: Path) -> None:
    """Run the arms of one cell and add their results."""
    fault = FAULTS[name]
    # One moment for all arms. Not the step of a save: the record of that step comes before its checkpoint.
    moment = random.Random(f"{name} {seed}").choice([step for step in range(21, 40) if step % SAVE_EVERY])
    cell = out / f"{name}-{seed}-{time.time():.0f}"
    jobs = [Job(arm, cell / arm, cell / "logs" / arm, moment) for arm in LEGEND]
    for job in jobs:
        job.folder.mkdir(parents=True)
        job.log.mkdir(parents=True)
    cluster = Cluster(len(LEGEND) + 1, send_user_signal=fault.user_signal)
    cluster.start()
    try:
        for job in jobs:
            submit(cluster, job, {"FAULTS_LOG": str(job.log), "FAULTS_PAUSE_S": "0.5"})
        watch(cluster, fault, jobs, cell / "logs" / "go")
        time.sleep(5)  # the last records are on their way to slurmdbd
        with (out / "results.jsonl").open("a") as file:
            for job in jobs:
                states = [record["State"] for record in cluster.sacct(job.number)]
                row = {"fault": name, "seed": seed, "arm": job.arm, "moment": moment, "states": states}
                row |= {"struck_at": job.struck_at, **measured(job, fault.true, causes(job), out)}
                file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    finally:
        cluster.stop()


def watch(cluster: Cluster, fault: Fault, jobs: list[Job], go: Path) -> None:
    """Let the jobs begin together, strike each at its step, and return when none will run again."""
    until("the start of each job", lambda: all((job.log / "pid").exists() for job in jobs), 240)
    go.touch()
    began = time.monotonic()
    for job in jobs:
        threading.Thread(target=strike, args=(cluster, fault, job), daemon=True).start()
    while not all(job.over for job in jobs):
        if time.monotonic() > began + _LIMIT_S:
            raise SystemExit(f"no end after {_LIMIT_S:.0f} s: {[job.arm for job in jobs if not job.over]}")
        time.sleep(3)
        for job in jobs:
            job.over = job.over or is_final(cluster, job)


def strike(cluster: Cluster, fault: Fault, job: Job) -> None:
    """Strike the job when its record shows the step."""
    while (steps := job.steps())[-1:] < [job.moment]:
        if job.over:
            return
        time.sleep(0.02)
    job.struck_at = steps[-1]
    fault.strike(cluster, job)


def is_final(cluster: Cluster, job: Job) -> bool:
    """True if the job has ended and is not about to return: asked twice."""
    try:
        before = cluster.state(job.number)
        time.sleep(2)
        return {before, cluster.state(job.number)} <= _FINAL
    except ClusterError:  # slurmctld is away
        return False


if __name__ == "__main__":
    main()
