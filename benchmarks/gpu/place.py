"""The device that is measured, and runs on it.

place = Place("cuda", num_gpus=8, folder=Path("runs/gpu"))
run = place.run("zero3", "deepspeed.zero_stage=3")     # finished, or an error that shows its log
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from r1hpc.api import Run, Submission, submit
from r1hpc.attempt.state.logs import tail
from r1hpc.base.errors import R1hpcError
from r1hpc.telemetry.records.metrics import Step, last_steps

CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "flash-attn", "vllm")
_RUN_TIMEOUT_S = 540.0
_WARM_UP_STEPS = 3


class PieceError(R1hpcError):
    """A piece cannot go on; the message is what the page says of it."""


@dataclass(frozen=True)
class Place:
    """The place a piece runs in."""

    device: str
    """cuda or cpu."""
    num_gpus: int
    folder: Path
    """The pieces' runs lie there."""

    @property
    def is_small(self) -> bool:
        """In the small: to see that the pieces work, on a machine without a card."""
        return self.device == "cpu"

    def start(self, name: str, *words: str, job: str = "smoke", ranks: int = 1) -> Run:
        """A run of `job` on this machine, under way; an older one of that name goes."""
        done = submit(
            job,
            overrides=[*self._resources(ranks), *words],
            executor="local",
            run_root=self.folder,
            run_name=self._fresh(name),
        )
        assert isinstance(done, Submission), "a single run"
        return done.run

    def run(self, name: str, *words: str, job: str = "smoke", ranks: int = 1) -> Run:
        """The same, once it is finished.

        Raises:
            PieceError: it ended otherwise; with the end of its log.
        """
        return finished(self.start(name, *words, job=job, ranks=ranks))

    def _resources(self, ranks: int) -> list[str]:
        if self.is_small:
            return ["resources.gpus_per_node=0", f"resources.ranks_per_node={ranks}"]
        return [f"resources.gpus_per_node={ranks}"]

    def _fresh(self, name: str) -> str:
        number = sum(path.name.startswith(f"{name}.") for path in self.folder.glob(f"{name}.*"))
        return f"{name}.{number + 1}"


def finished(run: Run, timeout_s: float = _RUN_TIMEOUT_S) -> Run:
    """Wait for its end.

    Raises:
        PieceError: it is another end than finished.
    """
    state = run.wait(timeout_s)
    if state.value != "finished":
        raise PieceError(f"{run.run_id} ended {state.value}: {run.situation().detail}\n{log_of(run)}")
    return run


def log_of(run: Run, lines: int = 12) -> str:
    """The end of what rank 0 printed in the last attempt."""
    log = run.folder.rank_log(len(run.attempts), 0)
    return b"\n".join(tail(log, lines)).decode(errors="replace") if log.is_file() else "no log"


def wait_until(what: str, is_so: Callable[[], bool], timeout_s: float = 240) -> None:
    """Poll.

    Raises:
        PieceError: it did not come to pass.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise PieceError(f"{what} did not come to pass in {timeout_s:.0f} s")
        time.sleep(0.1)


def wait_step(run: Run, step: int) -> None:
    """Until an optimizer step is on record."""

    def is_there() -> bool:
        newest = last_steps(run.folder, 1)
        return bool(newest) and newest[-1].global_step >= step

    wait_until(f"step {step} of {run.run_id}", is_there)


def settled(run: Run) -> list[Step]:
    """Its steps without the first ones, which allocate and compile."""
    steps = run.metrics()
    return steps[_WARM_UP_STEPS:] or steps


def median(run: Run, key: str) -> float | None:
    """Over the settled steps; None where no step has it."""
    values = [value for step in settled(run) if (value := step.number(key)) is not None]
    return statistics.median(values) if values else None


def facts(device: str) -> dict[str, str]:
    """Describe the machine of the figures: card, driver, versions, commit."""
    import torch

    found = {"python": platform.python_version(), "machine": platform.machine()}
    found |= {name: version for name in _PACKAGES if (version := _version(name))}
    commit = output("git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD")
    found |= {"commit": commit} if commit else {}
    if device == "cuda":
        major, minor, patch = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found["card"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        found["driver"] = output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"
        )
        found["cuda"], found["nccl"] = str(torch.version.cuda), f"{major}.{minor}.{patch}"
    else:
        found["card"] = "none: the CPU"
    return found


def output(*argv: str) -> str:
    """stdout of a command, stripped; empty where it fails or is not there."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
