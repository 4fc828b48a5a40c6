"""Estimate, run, actual, corrected estimate: does the error fall? Six real runs on a Slurm of four nodes.

    python benchmarks/calibration.py               # about three minutes; root on Debian, else it says so
    python benchmarks/calibration.py --sleep 0.4   # on a machine that others use too

Runs of jobs/smoke.yaml with other steps and nodes go in through `python -m r1hpc.submit`, one after another,
and train with DeepSpeed over gloo. The actual node-hours are Slurm's (sacct -D). Each run is judged by its
own estimate and by that estimate corrected by the runs before it, which is what a user sees at submission.
Where other processes compete for the cores, their coming and going is most of what differs between two runs;
--sleep adds a fixed time to each step, as if an accelerator took it, so that the cluster has a speed again.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RUNS = ((40, 1), (40, 2), (120, 1), (80, 2), (120, 2), (80, 1))
"""(steps, nodes)"""


def main() -> int:
    """Print the table of the command `calibrate`; 1 if the error did not fall."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sleep", type=float, default=0.0, metavar="S", help="seconds beside each step's work"
    )
    sleep_s = parser.parse_args().sleep

    from tests.cluster import Cluster
    from tests.cluster.packages import install, unavailable

    why_not = unavailable()
    if why_not is not None:
        print(f"not run: {why_not}")
        return 0
    install()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Cluster() as cluster:
        os.environ.update(cluster.env())
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        if sleep_s:
            os.environ["R1HPC_FAILPOINT"] = f"step.begin:sleep={sleep_s}::*"
        return measure(Path(folder) / "runs")


def measure(run_root: Path) -> int:
    """Run them and compare."""
    from r1hpc import calibrate
    from r1hpc.accounting.calibrate import finished_runs
    from r1hpc.accounting.correction import CPU, effect, score
    from tests.runs import submit, wait_over

    for number, (steps, nodes) in enumerate(RUNS, 1):
        size = (
            f"train.num_steps={steps}",
            "train.global_batch_size=8",
            "checkpoint.save_every=1000",
            "-N",
            str(nodes),
            "-t",
            "10",
        )
        name = f"{number}-{steps}steps-{nodes}n"
        submitted = submit(run_root, name, "--executor", "slurm", *size)
        causes = [attempt.cause for attempt in wait_over(submitted.run, 240)]
        print(f"{submitted.run.run_id}: {', '.join(str(cause) for cause in causes)}", flush=True)
    wait_for_accounting(run_root)
    calibrate.main(["--run-root", str(run_root)])
    shown = effect(score(finished_runs(run_root).of(CPU)))
    if shown is None:
        print("the runs left no estimate beside their hours")
        return 1
    before, after = shown.before.median_error, shown.after.median_error
    print(f"\nmedian error {before:.0%} as estimated, {after:.0%} corrected: ratio {after / before:.2f}")
    return 0 if after < before else 1


def wait_for_accounting(run_root: Path) -> None:
    """Until slurmdbd knows the end of every run, which it hears some seconds late."""
    from r1hpc.attempt.state import all_slurm_jobs
    from r1hpc.base.choose_run import list_runs
    from r1hpc.slurm.sacct import sacct_records
    from tests.runs import wait_until

    jobs = ",".join(job for run in list_runs(run_root) for job in all_slurm_jobs(run))

    def settled() -> bool:
        records = sacct_records(jobs)
        return len(records) >= len(RUNS) and all(record.end is not None for record in records)

    wait_until("end of every job in accounting", settled, 30)


if __name__ == "__main__":
    sys.exit(main())
