"""Save and resume, all ranks together: DeepSpeed writes, the checkpoint package commits.

Every collective decision is made by rank 0 and sent to all, so that no two ranks can disagree about which
checkpoint is good. DeepSpeed's own `latest` is never written: it names a checkpoint before the other
ranks have finished theirs.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.units import format_bytes
from r1hpc.base.version import __version__
from r1hpc.checkpoint.errors import CheckpointWriteError, NoUsableCheckpointError
from r1hpc.checkpoint.store import Checkpoint, CheckpointStore
from r1hpc.train.distributed import Group
from r1hpc.train.errors import ResumeError, SaveError

_TAG = "deepspeed"
_T = TypeVar("_T")
# Facts that must be the same at resume: they decide which numbers the run computes.
_IDENTITY = ("dataset_id", "plan_hash", "global_batch_size", "model", "precision")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. `world_size` and `zero_stage` may change, the rest may not."""

    dataset_id: str
    plan_hash: str
    global_batch_size: int
    model: str
    precision: str
    zero_stage: int
    world_size: int
    facts: dict[str, Any] = field(default_factory=dict)
    """More that may not change, under names of the stage's own."""

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ResumeError when a checkpoint's meta tells of another run."""
        ours = {name: getattr(self, name) for name in _IDENTITY} | self.facts
        for name, value in ours.items():
            if saved.get(name) != value:
                raise ResumeError(
                    f"the checkpoint was made with {name}={saved.get(name)}, this run has {name}={value}: "
                    "go back to the old setting, or start a run of another name"
                )
        if saved.get("zero_stage") != self.zero_stage and {saved.get("zero_stage"), self.zero_stage} != {
            1,
            2,
        }:
            raise ResumeError(
                f"the checkpoint is of ZeRO {saved.get('zero_stage')}, this run has deepspeed.zero_stage="
                f"{self.zero_stage}: DeepSpeed converts only between 1 and 2; go back to the old stage"
            )

    def to_meta(self) -> dict[str, Any]:
        """As a checkpoint's manifest holds it."""
        own = {k: v for k, v in self.__dict__.items() if k != "facts"}
        return {**own, **self.facts}

    def same_layout(self, saved: dict[str, Any]) -> bool:
        """Whether DeepSpeed's files fit as they are, without conversion."""
        if saved.get("zero_stage") == self.zero_stage == 0:
            return True  # every rank holds everything
        return (saved.get("world_size"), saved.get("zero_stage")) == (self.world_size, self.zero_stage)


class Snapshots:
    """The checkpoints of a run, as one rank takes part in them."""

    def __init__(
        self,
        store: CheckpointStore,
        group: Group,
        attempt: int,
        token: str,
        identity: Identity,
        scratch: Path,
    ) -> None:
        self._store = store
        self._group = group
        self._attempt = attempt
        self._token = token
        self._identity = identity
        self._scratch = scratch
        self.last_committed_step: int | None = None
        self.last_bytes = 0

    def choose(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, the same on all ranks; None for a fresh run.

        Bad ones that are passed over are named on rank 0's log; see CheckpointStore.newest_verified.

        Raises:
            NoUsableCheckpointError: there are checkpoints and none verifies.
            ResumeError: the newest good one belongs to another configuration.
        """
        checkpoint = self._store.newest_verified(self._group, lambda line: print(line, file=sys.stderr))
        if checkpoint is not None:
            self._accept(checkpoint)
        return checkpoint

    def _accept(self, checkpoint: Checkpoint) -> None:
        """Take it for the one to resume from; raise ResumeError where it belongs to another configuration."""
        self._identity.check(checkpoint.manifest.meta)
        difference = describe_versions(checkpoint.manifest.meta)
        if difference and self._group.rank == 0:
            print(f"{checkpoint.path.name} {difference}", file=sys.stderr)
        self.last_committed_step = checkpoint.step
        self.last_bytes = checkpoint.manifest.total_size

    def needs_conversion(self, checkpoint: Checkpoint | None) -> bool:
        """Whether DeepSpeed must be built to load a universal checkpoint."""
        return checkpoint is not None and not self._identity.same_layout(checkpoint.manifest.meta)

    def load(self, engine: Any, checkpoint: Checkpoint) -> Checkpoint:
        """Put the checkpoint into the engine and every random stream; returns it.

        One that verifies and cannot be loaded is named on rank 0's log, and the next older good one is taken,
        by all ranks alike; that one is returned.

        Raises:
            NoUsableCheckpointError: none can be loaded; names each.
        """
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
                candidate = self._store.newest_verified(self._group, self._report, below=candidate.step)
            except NoUsableCheckpointError as error:
                failed.append(str(error))
                break
            if candidate is not None:
                self._accept(candidate)
        raise NoUsableCheckpointError(
            f"no checkpoint can be loaded, of those in {self._store.root}: restore one, or move these "
            "folders away to start from the beginning\n  " + "\n  ".join(failed)
        )

    def _try_to_load(self, engine: Any, checkpoint: Checkpoint) -> str:
        """What went wrong on any rank, the same on all of them; empty when it is loaded everywhere.

        A rank that fails alone can leave the others in a collective of DeepSpeed's: the watchdog ends that.
        """
        mine = ""
        try:
            self._load(engine, checkpoint)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except OSError as error:
            # A read that failed may succeed in the next attempt; a file that is not there will not.
            if not isinstance(error, FileNotFoundError):
                raise
            mine = f"{type(error).__name__}: {error}"
        except Exception as error:  # DeepSpeed raises whatever its parts do, AssertionError among it
            first = (str(error).splitlines() or [""])[0]
            mine = f"{type(error).__name__}: {first}"
        return next(filter(None, self._group.gather(mine)), "")

    def _report(self, line: str) -> None:
        if self._group.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def _load(self, engine: Any, checkpoint: Checkpoint) -> None:
        if self.needs_conversion(checkpoint):
            folder = self._convert(checkpoint)
            path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
            self._group.barrier()
            if self._group.rank == 0:
                shutil.rmtree(folder.parent)
            seed_streams(checkpoint.manifest.meta["seed"], checkpoint.step, self._group.rank)
        else:
            path, _ = engine.load_checkpoint(str(checkpoint.path), tag=_TAG)
            restore_streams(checkpoint.path / _streams_name(self._group.rank))
        if path is None:
            raise ResumeError(f"DeepSpeed found nothing to load in {checkpoint.path}")

    def save(
        self,
        engine: Any,
        step: int,
        meta: dict[str, Any],
        *,
        hurry: bool,
        write_more: Callable[[Path], None],
    ) -> float:
        """Write and commit the state after `step` optimizer steps; returns the seconds it took.

        Args:
            write_more: puts the stage's own files of this rank, `stage_rank_<n>…`, into the folder.
            hurry: somebody is about to kill us; older checkpoints are removed as far as that takes no time.

        Raises:
            SaveError: disk full, I/O error, or this incarnation is superseded. The run's earlier
                checkpoints are untouched.
        """
        started = time.monotonic()
        staging = self._store.staging(step, self._attempt, self._token)
        self._tell(lambda: self._open_staging(step))
        failpoint("save.begin")
        try:
            # A rank that fails in here leaves the others in a barrier of DeepSpeed's; they are ended with it
            # (srun --kill-on-bad-exit). What they leave is removed when the next attempt begins.
            with self._store.writing(staging):
                engine.save_checkpoint(str(staging), tag=_TAG, save_latest=False)
                save_streams(staging / _streams_name(self._group.rank))
                write_more(staging)
        except (R1hpcError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if self._group.rank == 0:  # makes room on a full disk, also for the message to come
                self._store.abandon(step, self._attempt, self._token)
            raise SaveError(self._no_space(f"writing checkpoint step {step}", error)) from error
        failpoint("save.written")
        self._group.barrier()
        try:
            with self._store.writing(staging):
                names = self._own_files(staging)
                self._check_whole(staging, names)
            mine: Any = self._store.seal(staging, names)
        except R1hpcError as error:
            mine = str(error)
        sealed = self._group.gather(mine)
        failures = [s for s in sealed if isinstance(s, str)]
        if failures:
            if self._group.rank == 0:
                self._store.abandon(step, self._attempt, self._token)
            raise SaveError("; ".join(failures))
        records = [record for part in sealed for record in part]
        failpoint("save.sealed")
        full = {**self._identity.to_meta(), **versions(), **meta}
        self._tell(lambda: self._store.commit(step, self._attempt, self._token, records, full))
        failpoint("save.committed")
        self.last_committed_step = step
        self.last_bytes = sum(record.size for record in records)
        self._prune(step, hurry)
        return time.monotonic() - started

    def _prune(self, step: int, hurry: bool) -> None:
        # Not what it resumed from: that is as good as any other once `keep` newer ones are committed.
        if not hurry:
            self._tell(lambda: self._store.prune([step], at=step))
        elif self._group.rank == 0:
            self._try_to_prune(partial(self._store.prune, [step], at=step, hurry=True))

    def _try_to_prune(self, prune: Callable[[], object]) -> None:
        """The state is safe, which is what counts: what cannot be removed now is said and left."""
        try:
            prune()
        except R1hpcError as error:
            print(f"older checkpoints are not removed: {error}", file=sys.stderr)

    def _open_staging(self, step: int) -> None:
        free = shutil.disk_usage(self._store.root).free
        if free < self.last_bytes:
            raise SaveError(
                f"no room for checkpoint step {step}: {format_bytes(self.last_bytes)} needed as last time, "
                f"{format_bytes(free)} free under {self._store.root}; free some or lower checkpoint.keep"
            )
        self._store.open_staging(step, self._attempt, self._token)

    def _own_files(self, staging: Path) -> list[str]:
        """The files this rank wrote: those that carry its number; rank 0 also all that carry none."""
        files = (p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        return sorted(name for name in files if _owner(name, self._group.world_size) == self._group.rank)

    def _check_whole(self, staging: Path, names: list[str]) -> None:
        """Raise CheckpointWriteError unless this rank wrote what no load can do without."""
        rank, zero_stage = self._group.rank, self._identity.zero_stage
        due = {
            _streams_name(rank): True,
            # Of the weights rank 0 writes all, or each rank its part.
            "_model_states.pt": rank == 0 or zero_stage == 3,
            "_optim_states.pt": zero_stage > 0,
        }
        for ending, wanted in due.items():
            if wanted and not any(name.endswith(ending) for name in names):
                raise CheckpointWriteError(f"rank {rank} finds no file *{ending} of its own in {staging}")

    def _convert(self, checkpoint: Checkpoint) -> Path:
        """DeepSpeed's universal form of the checkpoint, in a scratch folder; the original stays as it is."""
        target = self._scratch / f"universal-{self._attempt}" / f"step-{checkpoint.step}"

        def convert() -> None:
            for leftover in self._scratch.glob("universal-*"):  # of a conversion that was killed
                shutil.rmtree(leftover)
            target.parent.mkdir(mode=0o700)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(checkpoint.path / _TAG), "--output_folder", str(target)]
            command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
            if checkpoint.manifest.meta["zero_stage"] < 3:
                command += ["--inject_missing_state"]
            clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
            if done.returncode:
                raise ResumeError(f"DeepSpeed could not convert {checkpoint.path}:\n{done.stderr[-2000:]}")

        self._tell(convert)
        return target

    def _tell(self, action: Callable[[], _T]) -> _T:
        """Do `action` on rank 0 and tell all; when it fails there, fail with the same words on all ranks."""
        answer: tuple[Any, tuple[str, str] | None] = (None, None)
        if self._group.rank == 0:
            try:
                answer = (action(), None)
            except R1hpcError as error:
                answer = (None, (type(error).__name__, str(error)))
            except OSError as error:
                answer = (None, (SaveError.__name__, self._no_space("checkpoint", error)))
        result, failure = self._group.broadcast(answer)
        if failure is not None:
            raise (ResumeError if failure[0] == ResumeError.__name__ else SaveError)(failure[1])
        value: _T = result
        return value

    def _no_space(self, what: str, error: Exception) -> str:
        free = shutil.disk_usage(self._store.root).free
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{what} failed: {first} ({format_bytes(free)} free under {self._store.root})"


def versions() -> dict[str, str]:
    """What a checkpoint was written with, as its manifest holds it."""
    return {"torch": torch.__version__, "deepspeed": version("deepspeed"), "r1hpc": __version__}


def describe_versions(saved: dict[str, Any]) -> str:
    """What of `versions` differs from those of a checkpoint's meta; empty where nothing does.

    Never a reason to refuse. A version that was not stored is not compared.
    """
    pairs = [(name, saved.get(name), ours) for name, ours in versions().items()]
    changed = [f"{name} {theirs} (now {ours})" for name, theirs, ours in pairs if theirs not in (None, ours)]
    if not changed:
        return ""
    return f"was written with {', '.join(changed)}: results may differ in the last bits from here on"


def seed_streams(seed: int, step: int, rank: int) -> None:
    """Fresh random streams, different for every (seed, step, rank)."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    torch.manual_seed(int(mixed[0]) << 16 ^ int(mixed[1]))
    np.random.seed(int(mixed[1]))
    random.seed(int(mixed[0]))


def save_streams(path: Path) -> None:
    """Write every random stream of this rank. DeepSpeed saves none.

    CUDA's only where this process uses a GPU: a CPU run must not take memory of one that is there.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    streams = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _uses_gpu() else None,
        "numpy": json.dumps([str(name), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)]),
        "python": json.dumps([version, list(internal), gauss_next]),
    }
    torch.save(streams, path)


def restore_streams(path: Path) -> None:
    """Read back what save_streams wrote."""
    streams = torch.load(path, weights_only=True)
    torch.set_rng_state(streams["torch"])
    if streams["cuda"] is not None and _uses_gpu():
        torch.cuda.set_rng_state(streams["cuda"])
    name, keys, position, has_gauss, gauss = json.loads(streams["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = json.loads(streams["python"])
    random.setstate((version, tuple(internal), gauss_next))


def _uses_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _streams_name(rank: int) -> str:
    return f"streams_rank_{rank}.pt"


def _owner(name: str, world_size: int) -> int:
    """The rank that wrote a file, by DeepSpeed's naming (`zero_pp_rank_3_mp_rank_00…`) and ours."""
    stem = name.rsplit("/", 1)[-1]
    for marker in ("zero_pp_rank_", "streams_rank_", "stage_rank_"):
        _, found, tail = stem.partition(marker)
        if found:
            rank = int(tail.replace(".", "_").split("_")[0])
            return rank if rank < world_size else 0
    return 0
