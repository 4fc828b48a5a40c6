"""Time a long history: CPU of `submit --dry-run` and `budget` over finished runs against an empty run root.

    python benchmarks/history.py [--runs 15] [--steps 42000] [--rounds 5]

The first call after a run has finished reads its steps and sums them up beside it; every later one reads the
sums. CPU is that of the child processes, user and system together; medians of alternating rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from r1hpc.base.files import append_record, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
BEGAN = 1_790_000_000.0
_ATTEMPTS = 3
"""Steps of each run; each one after the first takes 200 steps of the one before it again."""
_AGAIN = 200
_BUDGET = "gpu_hours: 1000000\n"
_MOST = 1.5
_COMMANDS = {
    "submit --dry-run": ["r1hpc.submit", "--dry-run", "--nodes", "1", "--executor", "slurm"],
    "budget": ["r1hpc.budget"],
}


def main() -> int:
    """Print each command's CPU and ratio; 1 where one is above the target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=42_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        empty, full = Path(folder) / "empty", Path(folder) / "full"
        empty.mkdir()
        (empty / "budget.yaml").write_text(_BUDGET)
        make_history(full, arguments.runs, arguments.steps)
        size = sum(path.stat().st_size for path in full.rglob("train.jsonl")) / 1e6
        print(f"{arguments.runs} finished runs of {arguments.steps:,} steps, {size:.0f} MB of metrics")
        ratios = [_measure(name, argv, empty, full, arguments.rounds) for name, argv in _COMMANDS.items()]
    return 0 if max(ratios) <= _MOST else 1


def _measure(name: str, argv: list[str], empty: Path, full: Path, rounds: int) -> float:
    for summary in full.glob("*/summary.json"):
        summary.unlink()
    (full / "calibration.json").unlink(missing_ok=True)
    first = cpu_s([*argv, "--run-root", str(full)])
    pairs = [[cpu_s([*argv, "--run-root", str(root)]) for root in (empty, full)] for _ in range(rounds)]
    nothing, again = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = float(again / nothing)
    print(
        f"{name:18} empty root {nothing:.2f} s, first call {first:.2f} s, later ones {again:.2f} s: "
        f"{ratio:.2f} x (at most {_MOST})"
    )
    return ratio


def cpu_s(argv: list[str]) -> float:
    """CPU seconds of `python -m ARGV`, its children included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    after = os.times()
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} exited {done.returncode}:\n{done.stdout}{done.stderr}")
    return sum(
        float(getattr(after, part) - getattr(before, part)) for part in ("children_user", "children_system")
    )


def make_history(root: Path, num_runs: int, num_steps: int) -> None:
    """Finished runs as r1hpc leaves them, and a budget that asks for them."""
    root.mkdir()
    (root / "budget.yaml").write_text(_BUDGET)
    for number in range(num_runs):
        run = RunDir(root / f"run{number}")
        run.create()
        load.save(RunConfig(train=TrainConfig(num_steps=num_steps)), run.config)
        write_json(run.plan, {"num_steps": num_steps, "gpu_hours_ceiling": 8 * 48.0})
        estimate = {"p10": 50.0, "p50": 90.0, "p90": 180.0}
        assumptions = {"gpu": "A100-SXM4-80GB", "gpu_given": True}
        write_json(run.path / "estimate.json", {"gpu_hours": estimate, "assumptions": assumptions})
        clock = BEGAN + 100_000 * number
        job = {"executor": "local", "job_id": f"local-{number + 1}"}
        append_record(run.attempts, {"event": "submitted", "time": clock, **job})
        share = num_steps // _ATTEMPTS
        for attempt in range(1, _ATTEMPTS + 1):
            first = max(1, (attempt - 1) * share - _AGAIN * (attempt > 1) + 1)
            last = num_steps if attempt == _ATTEMPTS else attempt * share
            clock = _attempt(run, attempt, first, last, clock + 60, job, last == num_steps)
        write_json(run.finished, {"global_step": num_steps, "time": clock})


def _attempt(
    run: RunDir, attempt: int, first: int, last: int, clock: float, job: dict[str, str], is_last: bool
) -> float:
    append_record(
        run.attempts,
        {"event": "begin", "time": clock, "attempt": attempt, "token": "0" * 16, **job, "host": "n1"}
        | {"node_names": ["n1"], "gpus": 8, "ranks": 8, "resumed_from": first - 1 or None},
        durable=False,
    )
    clock += 90
    with run.train_metrics.open("a") as steps, (run.metrics / "events.jsonl").open("a") as events:
        for step in range(first, last + 1):
            clock += 0.8
            line = {
                "global_step": step,
                "attempt": attempt,
                "time": clock,
                "loss": 2.0 + 5.0 / step,
                "grad_norm": 1.0 / step,
                "lr": 3e-4,
                "tokens": step * 524_288,
                "step_time_s": 0.79,
                "data_time_s": 0.01,
                "tokens_per_second": 524_288 / 0.79,
                "mfu": 0.41,
                "loss_scale": None,
                "skipped": False,
            }
            steps.write(json.dumps(line) + "\n")
            if step % 500 == 0:
                clock += 4
                save = {
                    "event": "save",
                    "time": clock,
                    "attempt": attempt,
                    "global_step": step,
                    "seconds": 4.0,
                }
                events.write(json.dumps(save) + "\n")
    committed = last if is_last else last - _AGAIN
    end = {"attempt": attempt, "cause": "finished" if is_last else "preempted", "detail": ""}
    end |= {"exit_status": 0, "last_committed_step": committed, "requeued": not is_last}
    append_record(run.attempts, {"event": "end", "time": clock + 20, **end}, durable=False)
    return clock + 20


if __name__ == "__main__":
    sys.exit(main())
