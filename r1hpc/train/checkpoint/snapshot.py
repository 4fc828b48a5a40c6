"""Save and resume, all ranks together; called by the training loop.

deepspeed_io.py takes the state from DeepSpeed, async_save.py writes it in a thread, and the toolkit's
checkpoint/ commits it. Rank 0 makes every collective decision and sends it to all, so ranks cannot disagree
about which checkpoint is good. DeepSpeed's own `latest` is never written: it names a checkpoint before the
other ranks have finished.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.units import format_bytes
from r1hpc.checkpoint.disk import CheckpointWriteError
from r1hpc.checkpoint.store import Checkpoint, CheckpointStore, NoUsableCheckpointError
from r1hpc.client.held.streams import seed_streams, set_streams, streams
from r1hpc.train.checkpoint.async_save import Exchange, Records, Report, Write, records_of
from r1hpc.train.checkpoint.deepspeed_io import (
    AbandonedError,
    CheckpointFiles,
    File,
    check_whole,
    convert,
    own_files,
    part_name,
    streams_name,
    write_file,
)
from r1hpc.train.checkpoint.identity import Identity, describe_versions, versions
from r1hpc.train.model.low_precision import load_adapters
from r1hpc.train.parallel.compression import Compressor, compression_name
from r1hpc.train.parallel.distributed import Group, by_rank_0
from r1hpc.train.parallel.engine import own_settings_kept
from r1hpc.train.parallel.errors import ConversionError, ResumeError, SaveError

_TAG = "deepspeed"
_SETTLE_S = 180.0
"""How long a write may go on after its rank failed, from this rank's last sign of life. It is longer than a
slow file system needs between two (4 GiB), and no longer, as the other ranks may be dead."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint and its cost."""

    step: int
    bytes: int
    copy_s: float
    """Training waited this long until everything was copied to host memory (or written, without a copy)."""
    copied_at: float
    write_s: float
    """From the copy to the commit."""
    waited_s: float
    """Part of write_s in which training waited too, at the end."""


class Snapshots:
    """The checkpoints of a run, as seen by one rank."""

    def __init__(
        self,
        store: CheckpointStore,
        group: Group,
        attempt: int,
        token: str,
        identity: Identity,
        scratch: Path,
        *,
        asynchronous: bool = False,
        ranks_per_node: int = 1,
        beat: Callable[[str], None] = lambda phase: None,
        hang_timeout_s: float = 3 * _SETTLE_S,
    ) -> None:
        """`beat` tells the watchdog of progress; it takes `hang_timeout_s` without a beat for a hang."""
        self._store = store
        self._beat = beat
        self._settle_s = min(_SETTLE_S, hang_timeout_s / 3)
        self._group = group
        self._attempt = attempt
        self._token = token
        self._identity = identity
        self._scratch = scratch
        self._files = CheckpointFiles(
            group, identity.zero_stage, asynchronous=asynchronous, ranks_per_node=ranks_per_node
        )
        self._exchange = Exchange(group)
        self._compressor: Compressor | None = None
        self._num_writes = 0
        self._write: Write | None = None
        self._is_hurried = False
        self._is_abandoned = False
        self._copy_s = 0.0
        self._copied_at = 0.0
        self._usual_s: float | None = None
        """Seconds the last complete save took."""
        self.last_committed_step: int | None = None
        self.last_bytes = 0

    def carry(self, compressor: Compressor) -> None:
        """Save and load every rank's state of the compressor too, from now on."""
        self._compressor = compressor

    def choose(self, below: int | None = None) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, of a step under `below`; None for a fresh run. The same
        on all ranks. Raise NoUsableCheckpointError if there are checkpoints and none verifies, ResumeError if
        the newest good one belongs to another configuration."""
        checkpoint = self._store.newest_verified(self._group, self._report, below=below)
        if checkpoint is None:
            return None
        self._identity.check(checkpoint.manifest.meta)
        if difference := describe_versions(checkpoint.manifest.meta):
            self._report(f"{checkpoint.path.name} {difference}")
        self.last_committed_step = checkpoint.step
        self.last_bytes = checkpoint.manifest.total_size
        return checkpoint

    def needs_conversion(self, checkpoint: Checkpoint | None) -> bool:
        """True if DeepSpeed must be built to load a universal checkpoint."""
        return checkpoint is not None and not self._identity.same_layout(checkpoint.manifest.meta)

    def load(self, engine: Any, checkpoint: Checkpoint) -> Checkpoint:
        """Load the checkpoint into the engine and every random stream, and return it. If a verified one
        cannot be loaded, all ranks take the next older good one; NoUsableCheckpointError if there is none."""
        self._files.attach(engine)
        needs_conversion, failed = self.needs_conversion(checkpoint), []
        candidate: Checkpoint | None = checkpoint
        while candidate is not None:
            if self.needs_conversion(candidate) == needs_conversion:
                problem = self._try_to_load(engine, candidate)
            else:
                problem = "is of another number of ranks or ZeRO stage than the newest"
            if not problem:
                if self._group.rank == 0:
                    self._try_to_prune(partial(self._store.prune_surplus, candidate.step))
                return candidate
            failed.append(f"{candidate.path.name}: {problem}")
            self._report(f"checkpoint cannot be loaded, trying an older one: {failed[-1]}")
            try:
                candidate = self.choose(below=candidate.step)
            except NoUsableCheckpointError as error:
                failed.append(str(error))
                break
        raise NoUsableCheckpointError(
            f"no checkpoint can be loaded, of those in {self._store.root}: restore one, or move these "
            "folders away to start from the beginning\n  " + "\n  ".join(failed)
        )

    def _try_to_load(self, engine: Any, checkpoint: Checkpoint) -> str:
        """Return the error of any rank, the same on all ranks; empty if all ranks loaded. A rank that fails
        alone can leave the others in a collective of DeepSpeed's: the watchdog ends that."""
        mine = ""
        try:
            self._load(engine, checkpoint)
        except (torch.OutOfMemoryError, MemoryError, ConversionError, SaveError):
            raise  # this machine's fault: an older checkpoint would fail too
        except OSError as error:
            # A failed read may succeed in the next attempt; a missing file will not appear.
            if not isinstance(error, FileNotFoundError):
                raise
            mine = f"{type(error).__name__}: {error}"
        except Exception as error:  # DeepSpeed raises anything, even AssertionError
            first = (str(error).splitlines() or [""])[0]
            mine = f"{type(error).__name__}: {first}"
        return next(filter(None, self._group.gather(mine)), "")

    def _report(self, line: str) -> None:
        if self._group.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def _load(self, engine: Any, checkpoint: Checkpoint) -> None:
        meta = checkpoint.manifest.meta
        if self.needs_conversion(checkpoint):
            folder = self._scratch / f"universal-{self._attempt}" / f"step-{checkpoint.step}"
            self._on_rank_0(lambda: convert(checkpoint.path / _TAG, folder, meta["zero_stage"], self._beat))
            with own_settings_kept(engine):
                path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
            self._group.barrier()
            if self._group.rank == 0:
                shutil.rmtree(folder.parent)
            seed_streams(meta["seed"], checkpoint.step, self._group.rank)
        else:
            custom = load_adapters if self._files.leaves_frozen_out else None
            path, _ = engine.load_checkpoint(str(checkpoint.path), tag=_TAG, custom_load_fn=custom)
            if meta["world_size"] == self._group.world_size:
                file = checkpoint.path / streams_name(self._group.rank)
                set_streams(torch.load(file, weights_only=True))
            else:  # ZeRO 0, whose files fit any number of ranks
                seed_streams(meta["seed"], checkpoint.step, self._group.rank)
        if self._compressor is not None:
            self._compressor.load(checkpoint.path, meta["world_size"])
        if path is None:
            raise ResumeError(f"DeepSpeed found nothing to load in {checkpoint.path}")

    @property
    def step_being_written(self) -> int | None:
        return self._write.step if self._write else None

    @property
    def is_over(self) -> bool:
        """True if this rank knows that the write is done or failed: then all ranks must `finish`."""
        return self._write is not None and self._write.is_over

    def save(
        self,
        engine: Any,
        step: int,
        meta: dict[str, Any],
        *,
        hurry: bool,
        write_more: Callable[[Path], None],
        make_durable: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state after `step` optimizer steps, and begin to write it. Collective.

        The write before it must be finished. Only `finish` returns a committed checkpoint.

        Args:
            write_more: puts the stage's own files of this rank, `stage_rank_<n>…`, into the folder, in the
                thread of the write.
            make_durable: called on rank 0 before the commit, for what the checkpoint relies on.
            hurry: the job is about to be killed; remove older checkpoints only if that takes no time.

        Raises:
            SaveError: disk full, I/O error, or this incarnation is superseded. The run's earlier
                checkpoints are untouched.
        """
        assert self._write is None, "one write at a time"
        started = time.monotonic()
        staging = self._store.staging(step, self._attempt, self._token)
        self._on_rank_0(lambda: self._open_staging(step))
        failpoint("save.begin")
        self._files.attach(engine)
        try:
            # A rank that fails here leaves the others in a DeepSpeed barrier; they end with it (srun
            # --kill-on-bad-exit). The next attempt removes their leftovers.
            with self._store.writing(staging):
                engine.save_checkpoint(
                    str(staging),
                    tag=_TAG,
                    save_latest=False,
                    exclude_frozen_parameters=self._files.leaves_frozen_out,
                )
                if self._compressor is not None:
                    own = staging / compression_name(self._group.rank)
                    self._files.keep(own, self._compressor.state())
        except (R1hpcError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if self._group.rank == 0:  # makes room on a full disk, also for the message to come
                self._store.abandon(step, self._attempt, self._token)
            raise SaveError(self._no_space(f"writing checkpoint step {step}", error)) from error
        files = [*self._files.take(), (staging / streams_name(self._group.rank), streams())]
        full = {**self._identity.to_meta(), **versions(), **meta}
        failpoint("save.copied")
        self._copy_s, self._copied_at = time.monotonic() - started, time.time()
        self._num_writes += 1
        self._is_hurried, self._is_abandoned = hurry, False
        self._write = Write(
            step,
            self._num_writes,
            self._exchange,
            partial(self._write_own, step, staging, files, write_more),
            partial(self._commit, step, full, make_durable),
            partial(self._prune, step, hurry),
        )

    def finish(self, *, hurry: bool = False) -> Saved | None:
        """Wait until the write under way is committed; None without one, or if it was abandoned. Collective.

        In a hurry it does not wait for the removal of older checkpoints. Raise SaveError if the write failed,
        on whichever rank, with all of them alike.
        """
        write, started = self._write, time.monotonic()
        if write is None:
            return None
        write.wait_for_own(self._group.beat)
        with self._group.waits():
            write.wait(hurry=hurry and not self._is_hurried)
        self._write = None
        outcomes = self._group.gather((write.problem, write.committed_bytes, write.seconds))
        if write.error is not None:
            raise write.error
        problems = [problem for problem, _, _ in outcomes if problem]
        _, num_bytes, write_s = outcomes[0]
        if num_bytes is None:
            if self._is_abandoned:
                return None
            raise SaveError(problems[0])
        self.last_committed_step, self.last_bytes = write.step, num_bytes
        self._usual_s = self._copy_s + write_s
        if problems:
            raise SaveError(problems[0])
        waited_s = time.monotonic() - started
        return Saved(write.step, num_bytes, self._copy_s, self._copied_at, write_s, waited_s)

    def settle(self) -> None:
        """Let the write under way end, on the way out with an error. Not collective.

        It is committed, or it fails and its files are removed: a full disk would hide why the run ended. The
        failed thread and the watchdog's may wait at once; neither leaves before the end.
        """
        write = self._write
        if write is not None:
            with self._group.waits():
                write.settle(self._settle_s, self._group.beat)

    def make_way(self, seconds_left: float | None) -> None:
        """Make room for a newer state to save in `seconds_left` (rank 0's count; None: unknown). Collective.

        The write under way is abandoned only if the newer state alone fits. If both fit, or not even that
        one, it goes on: a nearly written checkpoint is worth more than one that may never be.
        """
        write = self._write
        if write is None:
            return
        only_newer_fits = False
        if seconds_left is not None and self._usual_s is not None:
            rest_s = max(0.0, self._usual_s - (time.monotonic() - write.started_at))
            only_newer_fits = self._usual_s <= seconds_left < rest_s + self._usual_s
        self._is_abandoned = self._group.broadcast(only_newer_fits)
        if self._is_abandoned:
            self._report(f"the write of step {write.step} is abandoned for a newer one")
            write.abandon()

    def _write_own(
        self, step: int, staging: Path, files: list[File], write_more: Callable[[Path], None], write: Write
    ) -> Records:
        """Move the files into place and seal all that this rank wrote; in the thread of the write."""
        try:
            with self._store.writing(staging):
                failpoint("save.writing")
                for path, state in files:
                    write_file(path, state, write.stop, write.wrote)
                write_more(staging)
                failpoint("save.written")
                if write.stop.is_set():
                    raise AbandonedError("abandoned")
                names = own_files(staging, self._group)
                check_whole(staging, names, self._due_files(), self._group.rank)
        except AbandonedError:
            raise
        except (R1hpcError, RuntimeError) as error:
            raise SaveError(self._no_space(f"writing checkpoint step {step}", error)) from error
        records = self._store.seal(staging, names, write.wrote)
        failpoint("save.sealed")
        return records

    def _commit(
        self, step: int, meta: dict[str, Any], make_durable: Callable[[], None], reports: list[Report]
    ) -> int:
        """Commit and return the bytes; in rank 0's thread of the write."""
        try:
            records = records_of(reports)
            make_durable()
            self._store.commit(step, self._attempt, self._token, records, meta)
        except (R1hpcError, OSError) as error:
            # Remove at once, which also frees a full disk; a newer state with little time does not wait for
            # it.
            self._store.abandon(step, self._attempt, self._token, hurry=self._is_abandoned)
            if self._is_abandoned:
                threading.Thread(target=self._store.make_room, name="make room", daemon=True).start()
            if isinstance(error, OSError):
                raise SaveError(self._no_space(f"checkpoint step {step}", error)) from error
            raise
        failpoint("save.committed")
        return sum(record.size for record in records)

    def _prune(self, step: int, hurry: bool) -> None:
        # The one it resumed from is as good as any other once `keep` newer ones are committed.
        prune = partial(self._store.prune, [step], at=step, hurry=hurry)
        if hurry:
            self._try_to_prune(prune)
        else:
            prune()

    def _try_to_prune(self, prune: Callable[[], object]) -> None:
        """Prune, and only log what cannot be removed: the state is safe, which counts."""
        try:
            prune()
        except R1hpcError as error:
            print(f"could not remove older checkpoints: {error}", file=sys.stderr)

    def _open_staging(self, step: int) -> None:
        free = shutil.disk_usage(self._store.root).free
        if free < self.last_bytes:
            self._store.make_room()
            free = shutil.disk_usage(self._store.root).free
        if free < self.last_bytes:
            raise SaveError(
                f"No space left on device for step {step}: the last took {format_bytes(self.last_bytes)}, "
                f"{format_bytes(free)} are free under {self._store.root}; free some or lower checkpoint.keep"
            )
        self._store.open_staging(step, self._attempt, self._token)

    def _due_files(self) -> list[str]:
        """Return the endings of the files this rank writes without which nothing loads."""
        rank, zero_stage = self._group.rank, self._identity.zero_stage
        due = {
            streams_name(rank): True,
            # If weights are not in parts, rank 0 writes them all below ZeRO 3; under ZeRO 3 each rank its
            # own.
            "_model_states.pt": rank == 0 or zero_stage == 3,
            "_optim_states.pt": zero_stage > 0,
            part_name(rank): self._files.in_parts,
            compression_name(rank): self._compressor is not None,
        }
        return [ending for ending, is_due in due.items() if is_due]

    def _on_rank_0(self, action: Callable[[], _T]) -> _T:
        """Do `action` on rank 0 and send the result to all; its error there is raised on all ranks."""

        def guarded() -> _T:
            try:
                return action()
            except (ResumeError, ConversionError):
                raise
            except R1hpcError as error:
                raise SaveError(str(error)) from error
            except Exception as error:  # any error: the others wait for the result
                raise SaveError(self._no_space("checkpoint", error)) from error

        return by_rank_0(self._group, guarded)

    def _no_space(self, what: str, error: Exception) -> str:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, CheckpointWriteError):  # it has the space left, and what to do
            return f"{what} failed: {first}"
        free = shutil.disk_usage(self._store.root).free
        return f"{what} failed: {first} ({format_bytes(free)} free under {self._store.root})"
