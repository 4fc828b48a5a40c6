"""A build on several nodes of a real Slurm beside one on one node, each node held to a share of a core.

    python -m benchmarks.nodes [--gigabytes 0.2] [--nodes 3] [--core 0.6] [--folder DIR]

The corpus and the recipe of benchmarks/corpus.py, through `shard build --engine slurm`; seconds from the
command to the last job's end. Halfway through cleaning, the build on several nodes has one of its jobs
preempted, which is in its seconds too. Target: N nodes >= N / 1.2 of one. Then, of a tenth of that corpus,
whether Slurm and this machine alone make the same dataset. As root on Debian, for the tests' Slurm.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.corpus import RECIPE, write_corpus
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.inspect.describe import audit
from tests.cluster import Cluster
from tests.cluster.packages import install, unavailable
from tests.cluster.processes import until

_PERIOD_US = 100_000
_LONGEST_S = 7200


def main() -> int:
    """Print the seconds of both, their ratio, and what the ids say; 0 if the targets are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=0.2, help="of text (default 0.2)")
    parser.add_argument("--nodes", type=int, default=3, help="beside one (default 3)")
    parser.add_argument("--core", type=float, default=0.6, help="of a core for each node (default 0.6)")
    parser.add_argument("--folder", type=Path, help="where it all lies meanwhile (default: the system's)")
    chosen = parser.parse_args()
    why_not = unavailable()
    if why_not:
        print(f"not run: {why_not}")
        return 0
    install()
    with tempfile.TemporaryDirectory(dir=chosen.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with contextlib.ExitStack() as held:
            cluster = held.enter_context(Cluster(num_nodes=chosen.nodes))
            for node in cluster.node_names:
                held.callback(hold(cluster.state_record.processes[f"slurmd.{node}"][0], node, chosen.core))
            scales = scaling(cluster, corpus(folder / "whole", chosen.gigabytes), chosen.nodes)
            is_same = same(cluster, corpus(folder / "tenth", chosen.gigabytes / 10), chosen.nodes)
    return 0 if scales and is_same else 1


def corpus(folder: Path, gigabytes: float) -> Path:
    """A recipe, and beside it the files that it names."""
    folder.mkdir()
    write_corpus(folder, round(gigabytes * 1e9), workers=2)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return recipe


def hold(process: int, node: str, share: float) -> Callable[[], None]:
    """Let a process and all that it starts have no more than a share of one core; what ends that."""
    old = Path("/sys/fs/cgroup/cpu")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"r1hpc-{node}"
    group.mkdir(exist_ok=True)
    quota = round(share * _PERIOD_US)
    if old.is_dir():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
    (group / "cgroup.procs").write_text(str(process))

    def let_go() -> None:
        for each in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                (group.parent / "cgroup.procs").write_text(each)
        group.rmdir()

    return let_go


def scaling(cluster: Cluster, recipe: Path, nodes: int) -> bool:
    """Print how long one node and several take; whether several are fast enough and make the same."""
    alone_s, alone = build(cluster, recipe, 1)
    several_s, several = build(cluster, recipe, nodes, preempt=True)
    ratio = alone_s / several_s
    print(f"one node {alone_s:.0f} s, {nodes} nodes {several_s:.0f} s with a preemption: {ratio:.2f} x")
    print(f"same dataset: {alone == several}", flush=True)
    return ratio >= nodes / 1.2 and alone == several


def build(cluster: Cluster, recipe: Path, jobs: int, *, preempt: bool = False) -> tuple[float, str]:
    """Seconds, and the dataset's id."""
    out = recipe.parent / "data" / f"of-{jobs}"
    words = ["--out", str(out), "--engine", "slurm", "--jobs", str(jobs), "--exclusive", "--qos", "scavenger"]
    began = time.monotonic()
    done = cluster.run([sys.executable, "-m", "r1hpc.shard", "build", str(recipe), *words, "--json"])
    submitted = json.loads(done.stdout)["jobs"]
    if preempt:
        preempt_one(cluster, submitted["clean"], out, began)
    cluster.wait_job(int(submitted["publish"]), {"COMPLETED"}, timeout=_LONGEST_S)
    return time.monotonic() - began, identity(out)


def preempt_one(cluster: Cluster, clean: str, out: Path, began: float) -> None:
    """One of the jobs that clean, once half of the files are clean."""
    units = out.parent / f".staging-{out.name}" / "units" / "clean"
    wanted = len(list(out.parent.parent.glob("*.jsonl"))) // 2
    until("half of cleaning", lambda: len(list(units.glob("*/done.json"))) >= wanted, _LONGEST_S)
    victims: list[str] = []

    def is_one_running() -> bool:
        running = ["squeue", "-h", "-j", clean, "-t", "RUNNING", "-o", "%A"]
        victims[:] = cluster.run(running).stdout.split()
        return bool(victims)

    until("a job that cleans", is_one_running, _LONGEST_S)
    victim = int(victims[0])
    cluster.preempt(victim)
    print(f"job {victim} preempted {time.monotonic() - began:.0f} s into the build", flush=True)


def same(cluster: Cluster, recipe: Path, nodes: int) -> bool:
    """Print, and return, whether Slurm and a pool of processes make one dataset."""
    _, by_slurm = build(cluster, recipe, nodes)
    by_pool = identity(build_dataset(recipe, recipe.parent / "pool", workers=2).path)
    print(f"Slurm {by_slurm}, processes {by_pool}")
    is_same = by_slurm == by_pool
    print(f"same dataset: {is_same}")
    return is_same


def identity(dataset: Path) -> str:
    """Return the digest of a dataset's content, its name."""
    return str(audit(dataset)["id"])


if __name__ == "__main__":
    sys.exit(main())
