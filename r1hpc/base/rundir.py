"""The run folder: one class that knows the path of everything a run leaves behind.

<run_root>/<run_id>/
    config.yaml plan.json estimate.json job.sh environment.json code/    frozen before submission
    attempts.jsonl                                         one line per event, see telemetry.attempts
    summary.json allocations.json                          what attempts came to; what Slurm charged
    attempts/<k>/rank_<n>.json                             how each rank of attempt k ended
    logs/attempt_<k>/rank_<n>.out, logs/latest             what each rank printed
    metrics/train.jsonl, metrics/gpu-<node>.jsonl          per step; per NVML sample
    ledger/attempt_<k>.jsonl                               what data each step consumed
    checkpoints/step-<n>/                                  see checkpoint
    rollouts/window-<w>/batch-<b>.npz                      stage rl: finished groups of the rollout under way
    rollouts/evaluation-<step>/part-<n>.json               and answers of an evaluation under way
    parts/part-<n>.jsonl                                   stages traces, generate, evaluate: finished parts
    model/                                                 what was trained, as a Hugging Face folder
    traces.jsonl, evaluation.json, transcripts.txt         what traces, generate and evaluate leave
    report/                                                plots
    STOP, SAVE                                             touch one: stop after a save; save now
    FINISHED                                               the run is over; started again it exits 0
"""

import os
from pathlib import Path

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.names import check_name


class RunDir:
    """Paths of one run. Nothing is created by asking for a path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def estimate(self) -> Path:
        return self.path / "estimate.json"

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def allocations(self) -> Path:
        return self.path / "allocations.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def train_metrics(self) -> Path:
        return self.metrics / "train.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def traces(self) -> Path:
        return self.path / "traces.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def transcripts(self) -> Path:
        return self.path / "transcripts.txt"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def save(self) -> Path:
        return self.path / "SAVE"

    @property
    def finished(self) -> Path:
        return self.path / "FINISHED"

    def attempt_dir(self, attempt: int) -> Path:
        return self.path / "attempts" / str(attempt)

    def rank_outcome(self, attempt: int, rank: int) -> Path:
        return self.attempt_dir(attempt) / f"rank_{rank}.json"

    def attempt_logs(self, attempt: int) -> Path:
        return self.logs / f"attempt_{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.attempt_logs(attempt) / f"rank_{rank}.out"

    def gpu_metrics(self, node: str) -> Path:
        return self.metrics / f"gpu-{check_name(node, 'node name')}.jsonl"

    def create(self) -> None:
        """Make the folders, private to the user: pickles and logs live here."""
        self.path.mkdir(mode=0o700, parents=True)
        for folder in (self.logs, self.metrics, self.ledger, self.checkpoints, self.path / "attempts"):
            folder.mkdir(mode=0o700)


def default_run_root() -> Path:
    """$R1HPC_RUN_ROOT, else ./runs."""
    return Path(os.environ.get("R1HPC_RUN_ROOT") or "runs")


def open_run(path: Path | str) -> RunDir:
    """The run folder at `path`, or named so under the run root.

    Raises:
        UsageError: nothing there.
        StateError: the folder or its configuration belongs to somebody else, or others may write it.
    """
    for candidate in (Path(path), default_run_root() / path):
        run = RunDir(candidate)
        if run.config.is_file() or run.attempts.is_file():
            _check_private(run.path)
            return run
    raise UsageError(f"no run at {path} (looked for config.yaml there and under {default_run_root()})")


def _check_private(path: Path) -> None:
    status = path.stat()
    if status.st_mode & 0o022:
        raise StateError(f"others may write the run folder {path}; run: chmod go-w {path}")
