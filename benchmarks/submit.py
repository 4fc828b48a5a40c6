"""Time a submission beside a minimal submitit script, and each command's --help beside `import submitit`.

    python benchmarks/submit.py [--rounds 15]

Alternating runs in one process tree, medians. The command-to-job-id part runs where sbatch is on PATH and
configured; elsewhere an sbatch that answers at once takes its place for both sides, and the line says so.
Its seconds depend on the file system of $TMPDIR, into which the code is frozen. Bytecode is cached for both
sides, as for whoever submits a second time.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from r1hpc.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
_PEER = """
import sys, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(time=5, nodes=1)
print(executor.submit(print, "hello").job_id)
"""


def main() -> None:
    """Print two ratios beside their targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # cancelled jobs still write
        place = Path(folder)
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(place / "bytecode")}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        _measure_help(rounds, environ)
        _measure_submit(rounds, environ, place)


def _measure_help(rounds: int, environ: Mapping[str, str]) -> None:
    modules = [f"r1hpc.{name.replace('-', '_')}" for name in COMMANDS]
    argvs = [["-c", "import submitit"], *(["-m", module, "--help"] for module in modules)]
    (_, peer), *helps = _alternate(rounds, *(partial(_run_python, argv, environ) for argv in argvs))
    for module, (_, ours) in zip(modules, helps, strict=True):
        _print(f"{module} --help, CPU", ours, "import submitit", peer, 1.0)


def _measure_submit(rounds: int, environ: dict[str, str], place: Path) -> None:
    environ, where = _with_sbatch(environ, place)
    words = ["jobs/smoke.yaml", "--executor", "slurm", "--time", "5", "--run-root", str(place / "runs")]
    ours, peer = _alternate(
        rounds,
        lambda k: _run([sys.executable, "-m", "r1hpc.submit", *words, "--run-name", f"r{k}"], environ),
        lambda k: _run([sys.executable, "-c", _PEER, str(place / f"peer{k}")], environ),
    )
    for what, of_ours, of_peer in zip(("elapsed", "CPU"), ours, peer, strict=True):
        name = f"command to job id, {what} ({where})"
        _print(name, of_ours, "minimal submitit script", of_peer, 2.5)
    _cancel(environ)


def _run_python(argv: list[str], environ: Mapping[str, str], number: int) -> None:
    _run([sys.executable, *argv], environ)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # os.times() counts in steps of 10 ms
    return used.ru_utime + used.ru_stime


def _alternate(rounds: int, *sides: Callable[[int], None]) -> list[tuple[float, float]]:
    """The medians of each side's seconds, elapsed and of CPU, run in turns after one unmeasured round."""
    times: list[list[tuple[float, float]]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, taken in zip(sides, times, strict=True):
            begin, cpu_before = time.perf_counter(), _cpu_of_children()
            side(number)
            taken.append((time.perf_counter() - begin, _cpu_of_children() - cpu_before))
    return [
        (statistics.median(t for t, _ in taken[1:]), statistics.median(cpu for _, cpu in taken[1:]))
        for taken in times
    ]


def _run(argv: list[str], environ: Mapping[str, str]) -> None:
    done = subprocess.run(argv, env=environ, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{argv} failed:\n{done.stderr}")


def _with_sbatch(environ: dict[str, str], place: Path) -> tuple[dict[str, str], str]:
    check = ["bash", "-c", "sbatch --version && scontrol ping"]
    if subprocess.run(check, env=environ, capture_output=True).returncode == 0:
        return {**environ, "SBATCH_JOB_NAME": "r1hpc-benchmark"}, "real Slurm"
    answer = '[ "$1" = --parsable ] && echo 1 || echo "Submitted batch job 1"'
    for name, script in (("sbatch", answer), ("srun", ""), ("squeue", "")):  # squeue: no job is waiting
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o700)
    return {**environ, "PATH": f"{place}:{environ['PATH']}"}, "sbatch that answers at once"


def _cancel(environ: Mapping[str, str]) -> None:
    """End what was submitted for real; the minimal script cannot be given a name, submitit calls it so."""
    if "SBATCH_JOB_NAME" in environ:
        subprocess.run(["scancel", "--me", "--name=r1hpc-benchmark,submitit"], env=environ, check=False)


def _print(name: str, ours: float, peer_name: str, peer: float, target: float) -> None:
    ratio = ours / peer
    verdict = f"{'ok' if ratio <= target else 'TOO SLOW'}, target <= {target:g}"
    print(f"{name}: {ours * 1e3:.0f} ms, {peer_name}: {peer * 1e3:.0f} ms, ratio {ratio:.2f} ({verdict})")


if __name__ == "__main__":
    main()
