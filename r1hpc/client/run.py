"""Be part of a run, in a training script.

    run = attempt()
    state = TorchState(model=model, optimizer=optimizer)    # client/states.py; or DcpState, DeepSpeedState, …
    run.resume(state)                                       # all ranks: load the newest verified checkpoint
    for step in run.steps(1000, save_every=100, state=state):
        run.log(loss=train_step(step), lr=lr)

Outside a job of r1hpc the same script runs as it is: it starts at step 1, saves nothing and records nothing.
The script runs in an interpreter of its own, so this module needs only xxhash beside the standard library;
torch only where there are several ranks.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

from r1hpc.attempt.control.stop import SIGNALS, Deadlines, StopRequests, is_save_due
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import sync_file_system, write_atomic
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.manifest import step_folder
from r1hpc.checkpoint.store import ALONE, Checkpoint, CheckpointStore, Ranks
from r1hpc.client.job import Job, report_path
from r1hpc.client.logs import flush_logs
from r1hpc.telemetry.records.metrics import MetricWriter

_SLOW_S = 0.1
"""From this length of a step on, all ranks wait at its end until they agree."""
_LAST_S = 5.0
"""Seconds that an ending script waits for the other ranks' part of its last record."""
AGAIN = 99
"""Exit status of a script that is not done: run me again. As Grid Engine's."""


class State(Protocol):
    """All that a script must find again: weights, optimizer, random streams."""

    def save(self, folder: Path) -> None:
        """Write it into the folder. Every rank calls it with the same folder."""

    def load(self, folder: Path) -> None:
        """Read it back."""


@dataclass(frozen=True)
class Agreed:
    """All that any rank was asked to do, the same on every rank."""

    stop: bool = False
    save: bool = False


class Run:
    """One rank's side of the run. Methods marked collective must be called by all ranks alike."""

    def __init__(self, job: Job | None, requests: StopRequests | None = None) -> None:
        """Take part in `job`; `requests` are those of a process that handles its signals already."""
        self._job = job
        self._ranks: Ranks = ALONE
        self._sum: Any = _sum_alone
        self._seen: dict[str, Any] = {}
        self._samples = (0, 0, 0)
        self._open: tuple[dict[str, Any], Any] | None = None
        """A step's record and the sum over the ranks that it waits for."""
        self._is_slow, self._stops = True, False
        self.last_saved: int | None = None
        """The step of the newest checkpoint that this rank knows of."""
        self._named: set[str] = set()
        self._leader = ""
        self.rank = job.rank if job else int(os.environ.get("RANK", "0"))
        if job is None:
            return
        self._folder = RunDir(job.run)
        self._store = CheckpointStore(self._folder.checkpoints, keep=job.keep)
        self._pruning = threading.Thread(target=lambda: None)
        self._pruning.start()
        self._requests = requests or StopRequests(self._folder, job.rank, Deadlines(**job.deadlines))
        if requests is None:
            self._requests.install()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._record_last)
        self._writer = MetricWriter(self._folder, job.attempt) if job.rank == 0 else None
        self._tell("running")

    @property
    def is_job(self) -> bool:
        """True inside a job of r1hpc."""
        return self._job is not None

    @property
    def name(self) -> str:
        """Return the run's name; empty outside a job."""
        return self._folder.run_id if self._job else ""

    @property
    def leader(self) -> str:
        """Ends the steps, and answers a preemption: a library, or "script"; empty: nobody yet."""
        return self._leader

    @leader.setter
    def leader(self, name: str) -> None:
        is_new, self._leader = name != self._leader, name
        if is_new and self._job is not None:
            self._tell("running", self.last_saved)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._job.world_size if self._job else int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def save_every(self) -> int:
        """`checkpoint.save_every` of the job file; 0 outside a job."""
        return self._job.save_every if self._job else 0

    # Resuming

    def resume(self, state: State | None = None) -> Checkpoint | None:
        """Return the newest checkpoint whose every byte verifies, after loading it. Collective.

        torch.distributed must be up if there are several ranks. Raise NoUsableCheckpointError if there are
        checkpoints and none verifies.
        """
        if self._job is None:
            return None
        if state is not None:
            self.leader = self.leader or "script"
        self._meet()
        checkpoint = self._store.newest_verified(self._ranks, lambda line: print(line, file=sys.stderr))
        self.last_saved = checkpoint.step if checkpoint else None
        if checkpoint and state is not None:
            state.load(checkpoint.path)
        if self._writer:
            self._writer.event("resume" if checkpoint else "fresh", global_step=self.last_saved or 0)
            print(f"resuming after step {self.last_saved}" if checkpoint else "starting", flush=True)
        return checkpoint

    def _meet(self) -> None:
        """Connect the ranks, if there are several: from now on they agree."""
        assert self._job is not None
        if self._job.world_size == 1 or self._sum is not _sum_alone:
            return
        from r1hpc.client.ranks import TorchRanks  # torch

        found = TorchRanks(self._job.world_size)
        self._ranks, self._sum = found, found.sum

    # Steps

    def lead(self, library: str) -> None:
        """Let a library's training end the steps. Raise UsageError if it is the script's second training."""
        if self.leader == library:
            message = (
                "this script trains twice, and a run is one training: submit one script for each, "
                "`stages:` of a chain run them one after the other"
            )
            if self._job is not None:
                self._tell("refused", reason=message)
            raise UsageError(message)
        self.leader = library

    def steps(self, last: int, save_every: int = 0, state: State | None = None) -> Iterator[int]:
        """Yield the steps still to take, from 1; save when it is due, and leave when asked to. Collective.

        Args:
            save_every: steps between two checkpoints; 0 takes `checkpoint.save_every` of the job file.
        """
        self.leader = self.leader or "script"
        every = save_every or self.save_every
        step = self.last_saved or 0
        while step < last:
            step, began = step + 1, time.monotonic()
            self._seen, self._samples = {}, (0, 0, 0)
            yield step
            agreed = self.end_step(step, time.monotonic() - began)
            stops = agreed.stop and step < last
            is_due = is_save_due(step, every=every, last=last, asked=stops or agreed.save)
            if state is not None and self.is_job and is_due:
                with self.saving(step) as folder:
                    state.save(folder)
            if stops:
                self._stop_after(step)
                return
        self.finish(last)

    def _stop_after(self, step: int) -> None:
        """End this attempt after a save that was asked for. Collective."""
        self.leave(step)

    def log(self, **numbers: Any) -> None:
        """Record numbers of this step: loss (averaged over the ranks), lr, grad_norm, tokens, …"""
        self._seen.update(numbers)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers that a library logs after this step, evaluations too, to metrics/logged.jsonl."""
        if self._job is not None and self._writer:
            self._writer.logged(step, values)

    def name_not_kept(self, names: set[str]) -> None:
        """Name, once in each attempt, what no checkpoint of this script keeps."""
        fresh = sorted(names - self._named)
        self._named |= names
        if fresh and self._writer:
            self._writer.event("not_kept", names=fresh)
            print(f"not kept over a resume: {'; '.join(fresh)}", file=sys.stderr, flush=True)

    def used(self, num_samples: int, sample_sum: int, checksum: int) -> None:
        """Record what this rank read for this step; `Batches` calls it."""
        self._samples = (num_samples, sample_sum, checksum)

    def agree(self) -> Agreed:
        """Agree over all ranks on what was asked, now. Collective."""
        self._settle()
        self._ask({}, (0, 0, 0))
        return self._settle()

    def end_step(self, step: int, step_time_s: float) -> Agreed:
        """Record the step; return what all ranks agreed on. Collective; `steps` calls it.

        If steps are short, this is the agreement of the step before, so that no rank waits here.
        """
        line = {name: n.item() if hasattr(n, "item") else n for name, n in self._seen.items()}  # tensors
        line |= {"global_step": step, "time": time.time(), "step_time_s": step_time_s}
        agreed = self._settle()
        self._ask(line, self._samples)
        self._seen, self._samples = {}, (0, 0, 0)
        if self._is_slow:
            agreed = self._settle()
        failpoint("step.end")
        return agreed

    def _ask(self, line: dict[str, Any], samples: tuple[int, int, int]) -> None:
        """Start to sum over the ranks what is asked of each, and its part of the step's record."""
        if self._job is None:
            return
        stop, save = self._requests.poll()
        is_slow = self.rank == 0 and line.get("step_time_s", 0.0) >= _SLOW_S
        count, ids, check = samples
        parts = (count, ids, *divmod(check, 2**32))  # a double holds integers up to 2**53
        asked = (stop, save, is_slow, line.get("loss", 0.0), *parts)
        self._open = line, self._sum([float(value) for value in asked])

    def _settle(self) -> Agreed:
        """Wait for the sum that was begun, and record its step."""
        if self._open is None:
            return Agreed(self._stops)
        (line, begun), self._open = self._open, None
        stop, save, is_slow, loss, *parts = begun.result()
        self._stops = self._stops or stop > 0
        if line:
            self._is_slow = is_slow > 0 or self._ranks.world_size == 1
        if line and self._writer:
            if "loss" in line:
                line["loss"] = loss / self._ranks.world_size
            self._writer.step(**line)
            count, ids, high, low = map(int, parts)
            if count:
                step, check = line["global_step"], (high << 32) + low
                used = {"first_sample": (step - 1) * count, "num_samples": count}
                self._writer.used(global_step=step, **used, sample_sum=ids, checksum=check)
        return Agreed(self._stops, save > 0)

    def _record_last(self) -> None:
        """At exit, record the last step, unless a rank failed before it."""
        until = time.monotonic() + _LAST_S
        while self._open is not None and time.monotonic() < until:
            if self._open[1].is_done():
                with suppress(RuntimeError):  # a peer is gone
                    self._settle()
            time.sleep(0.01)

    def _forget(self) -> None:
        """A worker that the script forks must die of a signal, as it would without us."""
        self._open = None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    # Saving

    @contextmanager
    def saving(self, step: int, **meta: Any) -> Iterator[Path]:
        """Yield a folder for all ranks to write into; it becomes the checkpoint `step` by one rename.

        Collective. Files are made durable on the node that wrote them, and digested. Raise
        CheckpointWriteError if the disk is full or fails; earlier checkpoints are untouched. Raise
        SupersededError if a newer attempt has begun.
        """
        assert self._job is not None, "outside a job nothing is saved"
        job, store, began = self._job, self._store, time.monotonic()
        self._meet()
        self._settle()
        self._tell("saving", step)
        staging = store.staging(step, job.attempt, job.token)
        self._together(lambda: store.open_staging(step, job.attempt, job.token))
        try:
            with store.writing(staging):
                yield staging
                self._ranks.gather(None)  # all have written
                if job.local_rank == 0:
                    sync_file_system(staging)
            self._requests.copied()
            found = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
            # Together: on NFS a rank may not see another's files yet.
            names = sorted({name for part in self._ranks.gather(found) for name in part})
            mine = names[job.rank :: job.world_size]
            records = [each for part in self._ranks.gather(store.seal(staging, mine)) for each in part]
        except Exception:
            if job.rank == 0:  # makes room on a full disk, also for the outcome and the next attempt
                store.abandon(step, job.attempt, job.token)
            raise
        copied_at, copied_s = time.time(), time.monotonic() - began

        def commit() -> None:
            assert self._writer is not None
            self._writer.make_durable()
            done = store.commit(step, job.attempt, job.token, records, {"global_step": step, **meta})
            self._pruning.join()
            store.prune([step], at=step, hurry=True)
            if not self._requests.poll()[0]:  # deleting may take long
                self._pruning = threading.Thread(target=self._prune, args=(step,), daemon=True)
                self._pruning.start()
            seconds = time.monotonic() - began
            fields = {"bytes": done.manifest.total_size, "num_nodes": job.num_nodes, "copied_at": copied_at}
            self._writer.event(
                "save", global_step=step, seconds=seconds, waited_s=0.0, write_s=seconds - copied_s, **fields
            )
            print(f"saved step {step}", flush=True)

        self._together(commit)
        self.last_saved = step
        self._requests.committed()
        self._tell("running", step)

    def _prune(self, step: int) -> None:
        with suppress(R1hpcError):  # the next save tries again
            self._store.prune([step], at=step)

    def _together(self, action: Any) -> None:
        """Do it on rank 0; its error is raised on all ranks."""
        problem: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:  # the others wait for it
                problem = error
        said = self._ranks.broadcast(str(problem) or repr(problem) if problem else "")
        if problem is not None:
            raise problem
        if said:
            raise R1hpcError(f"rank 0: {said}")

    @property
    def checkpoints(self) -> Path:
        """Return the folder of all checkpoints."""
        return self._folder.checkpoints.resolve()

    @property
    def newest_folder(self) -> Path:
        """Return the folder of the newest checkpoint."""
        assert self.last_saved is not None
        return self._store.root / step_folder(self.last_saved)

    # Leaving

    def leave(self, step: int) -> NoReturn:
        """End this process after a save that was asked for; the next attempt goes on. Collective.

        Exits without unwinding, so that a script cannot write a final model that is not final.
        """
        self._settle()
        self._tell("stopped", step)
        flush_logs()
        os._exit(AGAIN)

    def give_up(self) -> NoReturn:
        """End at a request to stop that cannot be answered: nothing has been saved."""
        print("told to stop before the first save_state: nothing is saved", file=sys.stderr)
        self._tell("unsaved")
        flush_logs()
        os._exit(AGAIN)

    def finish(self, step: int) -> None:
        """Tell the rank that training is done; the script may go on, for example to write its model."""
        if self._job is not None:
            self._settle()
            self._tell("finished", step)

    def _tell(self, kind: str, step: int | None = None, reason: str = "") -> None:
        assert self._job is not None
        if kind == "stopped":
            reason = next(filter(None, self._ranks.gather(self._requests.reason)), "")
        report = {"kind": kind, "global_step": step, "reason": reason, "leader": self.leader}
        path = report_path(self._folder, self._job.attempt, self._job.rank)
        # Not durable: after a power cut nobody asks for it.
        write_atomic(path, json.dumps({"pid": os.getpid(), **report}), durable=False)


_current: Run | None = None


def attempt() -> Run:
    """Return the run of this process, the same at every call.

    Raise UsageError outside the main thread, which alone can handle signals.
    """
    global _current
    if _current is None:
        try:
            _current = Run(Job.current())
        except ValueError as error:
            if "main thread" in str(error):
                raise UsageError("call attempt() first in the main thread") from None
            raise
    return _current


def give_back_signals() -> None:
    """Let signals end this process as they would without us: it trains, and no loop of ours answers."""
    if _current is not None and _current.is_job and not _current.leader:
        _current._forget()


def _sum_alone(values: list[float]) -> Any:
    """Return the sum over one rank, in the form that TorchRanks.sum has."""
    return SimpleNamespace(is_done=lambda: True, result=lambda: values)
