"""Make a loop on Accelerate part of a run; the script stays as it is (hooks.py calls `attach`).

`save_state(FOLDER)` writes into the store's staging folder, which is committed by one rename and keeps its
name. The script passes its checkpoint to `load_state` by itself (`script.resume_args`). A stop is answered
between two batches if the number in the folder's name counts optimizer steps, else after the script's next
`save_state`. A number that goes back, while it counted the steps before, is replaced by the step.

A script that saved after the last batch of a pass resumes with the next pass, without the evaluation between
them. So the random streams after that evaluation are kept beside the checkpoint.
"""

import functools
import importlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from r1hpc.base.errors import UsageError
from r1hpc.client.held.streams import generator_states, set_generators, set_streams, streams
from r1hpc.client.job import Job
from r1hpc.client.run import Run, attempt

_Start = tuple[dict[str, Any] | None, list[Any]]
"""Random streams, and the states of a loader's own generators."""


def attach(module: ModuleType) -> None:
    """Wrap methods of accelerate.accelerator, of its optimizer and of its data loader."""
    shard = importlib.import_module("accelerate.data_loader").DataLoaderShard
    optimizer = importlib.import_module("accelerate.optimizer").AcceleratedOptimizer

    keeper = _Keeper()
    for owner, name, around in (
        (module.Accelerator, "save_state", keeper.save_state),
        (module.Accelerator, "load_state", keeper.load_state),
        (module.Accelerator, "backward", keeper.backward),
        (module.Accelerator, "log", keeper.log),
        (module.Accelerator, "clip_grad_norm_", keeper.clip),
        (optimizer, "step", keeper.step),
        (shard, "__iter__", keeper.batches),
    ):
        setattr(owner, name, _around(getattr(owner, name), around))


def _around(original: Any, method: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        job = Job.current()
        # A loop that does not call save_state keeps its own answer to a preemption.
        leads = job is None or job.library == "accelerate" or original.__name__.endswith("_state")
        # transformers' Trainer uses Accelerate too.
        if not leads or attempt().leader not in ("", "accelerate"):
            return original(self, *args, **kwargs)
        return method(original, self, *args, **kwargs)

    return call


class _Keeper:
    def __init__(self) -> None:
        self._run: Run | None = None
        self._accelerator: Any = None
        self._optimizer: Any = None
        self._step = 0
        self._loss: Any = 0.0
        self._grad_norm: Any = None
        self._began = time.monotonic()
        self._stem = ""
        """The script's folders are `STEM<step>`; empty: they count something else."""
        self._highest = 0
        """The highest number of such a folder."""
        self._stops = False
        self._loaded_streams: dict[str, Any] | None = None
        self._loaders: list[Any] = []
        """In the order of their first iteration."""
        self._open: dict[int, tuple[Any, _Start]] = {}
        """Number of a loader that is being iterated -> the loader, and the state when that began."""
        self._loaded_starts: dict[int, _Start] = {}
        self._iterations: dict[int, int] = {}
        """Number of the loader -> complete iterations; Accelerate shuffles by it."""
        self._ended: int | None = None
        """The newest checkpoint was saved after the last batch of this loader."""
        self._resumed_after: int | None = None
        """The same of the checkpoint that was loaded, until an iteration begins."""

    def _begin(self, is_loading: bool = False) -> Run:
        if self._run is None:
            self._run = run = attempt()
            run.leader = "accelerate"
            checkpoint = run.resume()
            if checkpoint is not None and is_loading:
                self._step = checkpoint.step
            elif checkpoint is not None:
                print(f"the script does not load {checkpoint.path}: set script.resume_args", file=sys.stderr)
        return self._run

    # Checkpoints

    def load_state(self, original: Any, owner: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load what the script names; without a name the newest."""
        run = self._begin(is_loading=True)
        if run.last_saved is None:
            return original(owner, input_dir, *args, **kwargs)
        newest = next(path for path in run.newest_folder.iterdir() if path.is_dir())
        given = newest if input_dir is None else Path(input_dir).resolve()
        if not given.exists() and given.name == newest.name:  # scripts look for it in their output folder
            given = newest.resolve()
        if given != newest.resolve() and run.checkpoints in given.parents:
            raise UsageError(f"{given} is not the newest good checkpoint, which is {newest}: move it away")
        with _named_by_us(owner):
            found = original(owner, str(given), *args, **kwargs)
        file = run.newest_folder / f"accelerate_rank_{run.rank}.pt"
        if file.is_file():
            kept = torch.load(file, map_location="cpu", weights_only=False)
            self._loaded_starts, self._stem = kept["starts"], kept["stem"]
            self._iterations, self._highest = kept["iterations"], kept.get("highest", 0)
            self._resumed_after = kept.get("ended")
        self._loaded_streams = streams()
        return found

    def save_state(
        self, original: Any, owner: Any, output_dir: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Save and commit; leave if the run is asked to stop."""
        run = self._begin()
        automatic = owner.project_configuration.automatic_checkpoint_naming
        name = f"checkpoint_{owner.save_iteration}" if automatic else Path(str(output_dir)).name
        number = None if automatic else re.fullmatch(r"(.*?)(\d+)", name)
        count = int(number[2]) if number and number[1] == self._stem and "epoch" not in self._stem else None
        if count is not None and count != self._step and count <= self._highest:
            print(f"{name} is saved at step {self._step}: kept as {self._stem}{self._step}", file=sys.stderr)
            name = f"{self._stem}{self._step}"
        else:
            self._stem = number[1] if number and int(number[2]) == self._step else ""
        self._highest = self._step
        with run.saving(self._step) as folder:
            with _named_by_us(owner):
                original(owner, str(folder / name), *args, **kwargs)
            ended = (number for number, (loader, _) in self._open.items() if loader.end_of_dataloader)
            self._ended = next(ended, None)
            kept = self._positions() | {"stem": self._stem, "highest": self._highest, "ended": self._ended}
            torch.save(kept, folder / f"accelerate_rank_{run.rank}.pt")
        self._began = time.monotonic()
        self._stops = self._stops or run.agree().stop
        if self._stops and self._ended is None:  # else after the evaluation
            run.leave(self._step)

    def _positions(self) -> dict[str, Any]:
        starts = dict(self._loaded_starts)  # of loaders that this attempt has not iterated
        starts |= {number: (None, generator_states(loader)) for number, loader in enumerate(self._loaders)}
        iterations = dict(self._iterations)
        for number, (loader, start) in self._open.items():
            if loader.end_of_dataloader:  # a resume begins the next iteration
                iterations[number] = loader.iteration + 1
            else:
                starts[number] = start
        return {"starts": starts, "iterations": iterations}

    # Steps

    def backward(self, original: Any, owner: Any, loss: Any, **kwargs: Any) -> None:
        """Add up the loss of the step."""
        self._accelerator = owner
        self._loss = self._loss + loss.detach() / owner.gradient_accumulation_steps
        original(owner, loss, **kwargs)

    def log(self, original: Any, owner: Any, values: Any, *args: Any, **kwargs: Any) -> None:
        """Record what the script logs, at the step that it took last."""
        attempt().record(self._step, values)
        original(owner, values, *args, **kwargs)

    def clip(self, original: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
        self._grad_norm = original(owner, *args, **kwargs)
        return self._grad_norm

    def step(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Record the step; its end is when the script asks for the next batch."""
        run = self._begin()
        self._optimizer = self._optimizer or optimizer
        lr = float(optimizer.param_groups[0]["lr"])
        done = original(optimizer, *args, **kwargs)
        if optimizer is self._optimizer and optimizer.gradient_state.sync_gradients:
            self._step += 1
            run.log(loss=float(self._loss), lr=lr)
            if self._grad_norm is not None:
                run.log(grad_norm=float(self._grad_norm))
            now = time.monotonic()
            agreed = run.end_step(self._step, now - self._began)
            self._stops = agreed.stop
            if agreed.stop and run.last_saved is None:
                run.give_up()
            self._loss, self._grad_norm, self._began = 0.0, None, now
        return done

    def batches(self, original: Any, loader: Any) -> Iterator[Any]:
        """Iterate, in the order drawn before a resume; stop between two batches."""
        number = self._number(loader)
        self._begin_pass(number)
        amid = self._restore_start(number, loader)
        self._open[number] = loader, (streams(), generator_states(loader))
        try:
            for batch in original(loader):
                if amid is not None:  # the order is drawn
                    set_streams(amid)
                    amid = None
                step = self._step
                yield batch
                trained = self._step > step  # else it is an evaluation
                if self._stops and self._stem and trained and not loader.end_of_dataloader:
                    self._accelerator.save_state(f"{self._stem}{self._step}")
        finally:  # also if the script breaks out of its loop
            self._open.pop(number, None)
            self._iterations[number] = loader.iteration

    def _begin_pass(self, number: int) -> None:
        """Keep the random streams after an evaluation, or take over those of the last attempt."""
        run = attempt()
        if number == self._ended and run.is_job:
            file = _after_pass(run)
            torch.save({"step": self._step, "streams": streams()}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            self._ended = None
            if self._stops:
                run.leave(self._step)
        if number == self._resumed_after:
            file = _after_pass(run)
            kept = torch.load(file, weights_only=False) if file.is_file() else {}
            if kept.get("step") == self._step:
                self._loaded_streams = kept["streams"]
            else:
                run.name_not_kept(
                    {f"random numbers of the evaluation after step {self._step}: it was cut off"}
                )
        self._resumed_after = None

    def _restore_start(self, number: int, loader: Any) -> dict[str, Any] | None:
        """Set the random streams from which the checkpoint's iteration drew its order.

        Return those to go on with after that; None if the loader was not amid an iteration.
        """
        before, states = self._loaded_starts.pop(number, (None, []))
        set_generators(states, loader)
        if self._loaded_streams is not None:
            set_streams(self._loaded_streams)
            self._loaded_streams = None
        loader.iteration = max(loader.iteration, self._iterations.get(number, 0))
        if before is None:
            return None
        amid = streams()
        set_streams(before)
        return amid

    def _number(self, loader: Any) -> int:
        """Return the loader's number, that of its data set: one that skips batches is another object."""
        for number, known in enumerate(self._loaders):
            if known.dataset is loader.dataset:
                return number
        self._loaders.append(loader)
        return len(self._loaders) - 1


def _after_pass(run: Run) -> Path:
    """Return the file with the random streams after the newest evaluation between two passes."""
    return run.checkpoints.parent / f"after_pass_{run.rank}.pt"


@contextmanager
def _named_by_us(owner: Any) -> Iterator[None]:
    naming = owner.project_configuration
    automatic, naming.automatic_checkpoint_naming = naming.automatic_checkpoint_naming, False
    try:
        yield
    finally:
        naming.automatic_checkpoint_naming = automatic
