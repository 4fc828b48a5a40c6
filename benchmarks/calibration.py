"""Estimate, run, actual, corrected estimate: does the error fall?

    python benchmarks/calibration.py               # simulated, then six real runs on a Slurm of four nodes
    python benchmarks/calibration.py --simulated   # a second; no cluster
    python benchmarks/calibration.py --sleep 0.4   # on a machine that others use too

Each run is judged by its own estimate and by that estimate corrected by the runs before it, which is what a
user sees at submission.

Simulated: two sites with six finished runs each, over ten seeds of noise. The estimates are the estimator's
own. One site's CPU nodes take three times as long as those that the estimator was measured on, start-up and
steps alike; the other's A100s half as long again as published runs. Each run differs from that by a log-
normal factor with the spread of whole runs within one published family (0.16).

Real: runs of jobs/smoke.yaml with other steps and nodes go in through `python -m r1hpc.submit`, one after
another, and train with DeepSpeed over gloo; about three minutes, as root on Debian, else it says so. The
actual node-hours are Slurm's (sacct -D). Where other processes compete for the cores, their coming and
going is most of what differs between two runs; --sleep adds a fixed time to each step, as if an accelerator
took it, so that the cluster has a speed again, and one that the estimator does not expect.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from r1hpc.accounting.correction import CPU, Effect, FinishedRun, effect, score
from r1hpc.config.load import load
from r1hpc.plan.hours.estimate import estimate
from r1hpc.plan.hours.estimate_run import cpu_node_hours
from r1hpc.plan.hours.spread import Spread
from r1hpc.plan.hours.workload import Workload
from r1hpc.plan.run import make_plan
from r1hpc.plan.topology.gpus import find_gpu

ROOT = Path(__file__).resolve().parents[1]
RUNS = ((40, 1), (40, 2), (120, 1), (80, 2), (120, 2), (80, 1))
"""(steps, nodes) of the CPU runs."""
GPU_RUNS = ((20e9, 32), (8e9, 16), (40e9, 64), (20e9, 32), (10e9, 16), (30e9, 64))
"""(tokens, A100s) of a model of 1.3 B: 100 to 600 GPU-hours."""
SEEDS = range(10)
NOISE = 0.16
SLOWER = {"cpu": 3.0, "a100": 1.5}
"""True hours of the simulated sites over the estimate."""


def main() -> int:
    """0 if the corrected error is at most half, in the median over the seeds, and fell in the real runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulated", action="store_true", help="no real runs")
    parser.add_argument(
        "--sleep", type=float, default=0.0, metavar="S", help="seconds beside each step's work, real runs"
    )
    arguments = parser.parse_args()
    halved = [simulate(site) <= 0.5 for site in SLOWER]
    if arguments.simulated:
        return 0 if all(halved) else 1
    return max(0 if all(halved) else 1, run_for_real(arguments.sleep))


def simulate(site: str) -> float:
    """Print each seed's errors; the median ratio of corrected to uncorrected."""
    print(f"\n{site}: six runs that take {SLOWER[site]:g} x the estimate, each x exp(N(0, {NOISE}))")
    print("  seed  error  corrected  ratio  P90/P10  corrected  inside")
    ratios = [show(seed, effect_of(seed, site)) for seed in SEEDS]
    print(f"  median ratio {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")
    return statistics.median(ratios)


def effect_of(seed: int, site: str) -> Effect:
    """Over the five runs of a seed that had one before them."""
    found = effect(score(simulated_runs(seed, site)))
    assert found is not None, "six runs of one kind"
    return found


def show(seed: int, found: Effect) -> float:
    before, after = found.before, found.after
    ratio = after.median_error / before.median_error
    print(
        f"  {seed:4d}  {before.median_error:5.0%}  {after.median_error:9.0%}  {ratio:5.2f}"
        f"  {before.median_width:7.1f}  {after.median_width:9.1f}  {after.num_inside} of {found.num_runs}"
    )
    return ratio


def simulated_runs(seed: int, site: str) -> list[FinishedRun]:
    """Six finished runs, oldest first."""
    dice = random.Random(seed)
    made = cpu_runs() if site == CPU else gpu_runs()
    return [
        FinishedRun(
            run_id=f"{site}-{number}",
            resource=site,
            stage="pretrain",
            finished_at=float(number),
            estimate=hours,
            hours=hours.p50 * SLOWER[site] * math.exp(dice.gauss(0, NOISE)),
            source="run",
            useful_share=0.6 if site == CPU else 0.95,
            num_gpus=0 if site == CPU else width,
            num_nodes=width if site == CPU else 1,
        )
        for number, (hours, width) in enumerate(made)
    ]


def cpu_runs() -> list[tuple[Spread, int]]:
    """(node-hours estimated, nodes) of RUNS."""
    found = []
    for steps, nodes in RUNS:
        config = load("smoke", [f"train.num_steps={steps}", "train.global_batch_size=8"])
        plan = make_plan(config, gpus_per_node=0, num_nodes=nodes, vocab_size=4096)
        hours = cpu_node_hours(plan)
        assert hours is not None, "the model of jobs/smoke.yaml is known"
        found.append((hours, nodes))
    return found


def gpu_runs() -> list[tuple[Spread, int]]:
    """(GPU-hours estimated, GPUs) of GPU_RUNS."""
    found = []
    for tokens, gpus in GPU_RUNS:
        work = Workload.of_counts(params=1.3e9, tokens=tokens, gpu=find_gpu("a100"), num_gpus=gpus)
        hours = estimate(work).gpu_hours
        assert hours is not None, "of GPUs"
        found.append((hours, gpus))
    return found


def run_for_real(sleep_s: float) -> int:
    """Six runs on a cluster of their own; 1 if the error did not fall."""
    sys.path.insert(0, str(ROOT))
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
    from tests.runs import submit, wait_over

    for number, (steps, nodes) in enumerate(RUNS, 1):
        submitted = submit(run_root, f"{number}-{steps}steps-{nodes}n", *_flags(steps, nodes))
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


def _flags(steps: int, nodes: int) -> Sequence[str]:
    return (
        *("--executor", "slurm", "-N", str(nodes), "-t", "10"),
        *(f"train.num_steps={steps}", "train.global_batch_size=8", "checkpoint.save_every=1000"),
    )


def wait_for_accounting(run_root: Path) -> None:
    """Until slurmdbd knows the end of every run, which it hears some seconds late."""
    from r1hpc.attempt.state.state import slurm_jobs
    from r1hpc.base.choose_run import list_runs
    from r1hpc.slurm.sacct import sacct_records
    from tests.runs import wait_until

    jobs = ",".join(job for run in list_runs(run_root) for job in slurm_jobs(run))

    def settled() -> bool:
        records = sacct_records(jobs)
        return len(records) >= len(RUNS) and all(record.end is not None for record in records)

    wait_until("end of every job in accounting", settled, 30)


if __name__ == "__main__":
    sys.exit(main())
