"""Define the paths of a run folder that several packages use, and open a run by its path or name.

run = open_run("runs/r1-20260101")       # or its name, under $R1HPC_RUN_ROOT or ./runs
run.train_metrics, run.rank_log(attempt=2, rank=0)
"""

import os
from pathlib import Path
from typing import Any

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.names import at_home, check_name

CHAIN = "chain.yaml"
"""File in the folder of a chain, whose stages are runs."""
SWEEP = "sweep.json"
"""File in the folder of a sweep, whose points are runs."""


class Inside:
    """A path inside the folder of a run or a chain, whose `path` it begins with."""

    def __init__(self, relative: str) -> None:
        self._relative = relative

    def __get__(self, folder: Any, owner: type) -> Path:
        path: Path = folder.path / self._relative
        return path


class RunDir:
    """Paths of one run, <run_root>/<run_id>/. Reading a path creates nothing."""

    # Frozen before submission.
    config = Inside("config.yaml")
    plan = Inside("plan.json")
    estimate = Inside("estimate.json")
    script = Inside("job.sh")
    environment = Inside("environment.json")
    code = Inside("code")
    shell_functions = Inside("code/r1hpc/slurm/job.bash")  # sourced by job.sh

    attempts = Inside("attempts.jsonl")  # one line per event, see telemetry.records.attempts
    summary = Inside("summary.json")  # totals of the attempts
    allocations = Inside("allocations.json")  # Slurm's charges
    logs = Inside("logs")  # output of each rank; logs/latest is the newest attempt's
    metrics = Inside("metrics")
    train_metrics = Inside("metrics/train.jsonl")  # a line per optimizer step
    events = Inside("metrics/events.jsonl")  # saves, resumes, warnings; see telemetry.records.lines
    logged = Inside("metrics/logged.jsonl")  # numbers that a script logs, by step
    rl_evaluations = Inside("metrics/evaluation.jsonl")  # evaluations between the steps of stage rl
    ranks = Inside("metrics/ranks.jsonl")  # each rank's work and wait, see telemetry.records.ranks
    ledger = Inside("ledger")  # attempt_<k>.jsonl: the data consumed by each step
    checkpoints = Inside("checkpoints")  # step-<n>/, see checkpoint
    report = Inside("report")  # plots
    trackers = Inside("trackers")  # files for W&B, TensorBoard and Prometheus, see telemetry.trackers

    # Stage rl: window-<w>/batch-<b>.npz, finished groups of the current rollout, and
    # evaluation-<step>/part-<n>.json, answers of the current evaluation.
    rollouts = Inside("rollouts")
    trained = Inside("trained")  # <n>.json and .npz: with rl.max_staleness, see train.rl.record
    exchange = Inside("exchange")  # for rollout workers: versions of the weights, orders; see train.exchange
    workers = Inside("workers")  # <worker>/: the boxes of its starts, which it alone writes
    # Stages traces, generate, evaluate: part-<n>.jsonl, finished parts, and the final files.
    parts = Inside("parts")
    traces = Inside("traces.jsonl")
    evaluation = Inside("evaluation.json")
    transcripts = Inside("transcripts.txt")

    # The model files that vLLM reads beside the trainer.
    served = Inside("served")

    # Stage serve, see serving.address.
    server = Inside("server")
    server_key = Inside("server/key")
    server_address = Inside("server/address.json")  # there while it answers
    loadtests = Inside("loadtest")  # <time>.json of each load test

    model = Inside("model")  # the trained model, as a Hugging Face folder
    finished = Inside("FINISHED")  # the run is over; a new start exits 0; see checkpoint.finished
    inputs = Inside("inputs.json")  # digests of the results of other runs that it reads
    stop = Inside("STOP")  # touch it: stop after a save
    save = Inside("SAVE")  # touch it: save now

    # One process at a time, see base.lock: for the submission, and for the job that begins an attempt.
    submission_lock = Inside("submission.lock")
    begin_lock = Inside("begin.lock")

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def run_id(self) -> str:
        return self.path.name

    def attempt_dir(self, attempt: int) -> Path:
        return self.path / "attempts" / str(attempt)

    def rank_outcome(self, attempt: int, rank: int) -> Path:
        return self.attempt_dir(attempt) / f"rank_{rank}.json"

    def attempt_logs(self, attempt: int) -> Path:
        return self.logs / f"attempt_{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.attempt_logs(attempt) / f"rank_{rank}.out"

    def gpu_metrics(self, node: str) -> Path:
        """Return the GPU readings of a node; gpu-<node>.folded beside it has their sums."""
        return self.metrics / f"gpu-{check_name(node, 'node name')}.jsonl"

    @property
    def all_gpu_metrics(self) -> list[Path]:
        """Return the GPU readings of every node that has written any."""
        return sorted(self.metrics.glob("gpu-*.jsonl"))

    def record(self, rollout: int) -> Path:
        """Return the record of a rollout that was trained on."""
        return self.trained / f"{rollout:06d}.json"

    @property
    def all_parts(self) -> list[Path]:
        """Return the finished parts of stages traces, generate and evaluate."""
        return sorted(self.parts.glob("part-*.jsonl"))

    @property
    def all_batches(self) -> list[Path]:
        """Return the finished batches of stage rl's current rollout or evaluation."""
        forms = ("window-*/batch-*", "evaluation-*/part-*")
        return sorted(path for form in forms for path in self.rollouts.glob(form))

    def create(self) -> None:
        """Make the folders, private to the user: they hold pickles and logs."""
        self.path.mkdir(mode=0o700, parents=True)
        for folder in (self.logs, self.metrics, self.ledger, self.checkpoints, self.path / "attempts"):
            folder.mkdir(mode=0o700)


def is_chain_or_sweep(folder: Path) -> bool:
    return (folder / CHAIN).is_file() or (folder / SWEEP).is_file()


def default_run_root() -> Path:
    """Return $R1HPC_RUN_ROOT, else ./runs."""
    return Path(at_home(os.environ.get("R1HPC_RUN_ROOT") or "runs"))


def run_root_of(given: str | Path | None) -> Path:
    """Return the run root of --run-root, else the default one."""
    return Path(given) if given else default_run_root()


def places_of(given: str | Path, run_root: str | Path | None) -> tuple[Path, Path]:
    """Return where a run, chain or sweep may lie, the likelier first: under --run-root if that is given."""
    here, there = Path(given), run_root_of(run_root) / given
    return (there, here) if run_root else (here, there)


def open_run(path: Path | str) -> RunDir:
    """Return the run folder at `path`, or of that name under the run root.

    Raise UsageError if there is none, StateError if others may write the folder.
    """
    run = find_run(path)
    check_private(run)
    return run


def find_run(path: Path | str) -> RunDir:
    """Return the run folder like open_run, also one that others may write: for callers that neither
    execute nor unpickle its files."""
    for candidate in (Path(path), default_run_root() / path):
        run = RunDir(candidate)
        if run.config.is_file() or run.attempts.is_file():
            return run
    raise UsageError(
        f"no run at {path} (looked for config.yaml there and under {default_run_root().absolute()}): "
        "`python -m r1hpc.status --all` lists the runs; set their folder with --run-root DIR or "
        "R1HPC_RUN_ROOT"
    )


def check_private(run: RunDir) -> None:
    """Raise StateError if others may write a run folder, since its files are executed."""
    if run.path.stat().st_mode & 0o022:
        raise StateError(f"others may write the run folder {run.path}; run: chmod go-w {run.path}")
