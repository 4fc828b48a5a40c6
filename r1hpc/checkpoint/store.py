"""Keep checkpoints that survive a kill at any moment: stage, commit by one rename, verify on load.

    store = CheckpointStore(run.checkpoints, keep=2)
    store.begin(attempt, token)                          # batch host, before the ranks start
    checkpoint = store.newest_verified(ranks)            # all ranks: what to resume from, or None at first
    store.open_staging(step, attempt, token)             # rank 0, then a barrier
    records = store.seal(folder, ["rank_0.pt"])          # every rank, its own files; then gather
    store.commit(step, attempt, token, records, meta)    # rank 0; when it returns, the checkpoint exists
    store.prune([step], at=step)

    <root>/step-00000120/{manifest.json,...}             committed
    <root>/LATEST                                        a hint for people; no code trusts it
    <root>/.incarnation-<attempt>-<token>/step-<n>/      being written, see fence
    <root>/.trash-*                                      being removed

A rank that gets a CheckpointWriteError reports it to the others; then rank 0 calls `abandon`. `Ranks` is the
ranks' interface (train.parallel.distributed.Group is one); a single process is ALONE. No torch here.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from r1hpc.base.errors import StateError
from r1hpc.base.files import check_owned
from r1hpc.checkpoint import fence
from r1hpc.checkpoint.commit import LATEST, commit_folder, point_latest, seal_files
from r1hpc.checkpoint.disk import (
    CheckpointWriteError,
    at,
    discard,
    move_to_trash,
    remove_tree,
    sweep_trash,
    write_error,
)
from r1hpc.checkpoint.manifest import (
    Candidate,
    Checkpoint,
    FileRecord,
    Manifest,
    check_file_name,
    encode,
    examine,
    step_folder,
    step_of,
)
from r1hpc.checkpoint.verification import Fingerprint, find_layout_problems, find_problems, fingerprint

__all__ = ["Candidate", "Checkpoint", "CheckpointStore", "FileRecord", "Manifest"]
MIN_KEEP = 2
_log = logging.getLogger(__name__)
List = list
"""Inside the class `list` means CheckpointStore.list."""


class NoUsableCheckpointError(StateError):
    """Checkpoint folders exist but none verifies. Never treated as a fresh start."""


class Ranks(Protocol):
    """One rank's place among all, and the two collectives needed to agree."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in rank order, on all ranks."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on all ranks."""

    @property
    def beat(self) -> Callable[[], None]:
        """A sign of life, called while files are read."""


class _Alone:
    rank = 0
    world_size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def beat(self) -> None:
        pass


ALONE: Ranks = _Alone()


class CheckpointStore:
    """The checkpoints of one run.

    All writing methods raise SupersededError once a newer attempt has begun, and CheckpointWriteError if the
    file system refuses (full, read-only, failing); earlier checkpoints stay intact.
    """

    def __init__(self, root: Path, keep: int = MIN_KEEP) -> None:
        self.root = Path(root)
        # The newest may turn out to be bad.
        self.keep = max(MIN_KEEP, keep)
        self._own: Path | None = None
        self._verified: dict[Path, Fingerprint] = {}

    # Fencing

    def begin(self, attempt: int, token: str) -> None:
        """Fence off every older incarnation. Once per attempt, on the batch host, before the ranks start.

        Choose the checkpoint to resume from only after this returned. Raise SupersededError if an incarnation
        with a higher attempt number has begun.
        """
        own = fence.incarnation_dir(self.root, attempt, token)
        with self.writing(own):
            with at("begin.root"):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The run folder may be reached through a link to scratch; its target must be ours.
            check_owned(self.root.resolve())
            self._own = fence.take_over(self.root, attempt, token)
            sweep_trash(self.root, "begin.sweep")

    # Writing

    def staging(self, step: int, attempt: int, token: str) -> Path:
        """Return the folder for the files of `step`. Computed only; nothing is read or created."""
        return fence.incarnation_dir(self.root, attempt, token) / step_folder(step)

    def open_staging(self, step: int, attempt: int, token: str) -> Path:
        """Create the staging folder, empty. Rank 0 only; the others wait for it, then write into it."""
        staging = self.staging(step, attempt, token)
        self._own = staging.parent
        self.abandon(step, attempt, token)
        try:
            with self.writing(staging):
                fence.check(staging.parent)
                with at("open.mkdir"):
                    # Without parents: a superseded incarnation has none.
                    staging.mkdir(mode=0o700)
                staging.chmod(0o700)
        except CheckpointWriteError:
            self.abandon(step, attempt, token)
            raise
        return staging

    def seal(
        self, staging: Path, names: Iterable[str], sealed: Callable[[], object] = lambda: None
    ) -> List[FileRecord]:
        """Make files durable and private and digest them. Every rank, for its own files.

        `names` are POSIX paths relative to `staging`. A failed fsync is a failed save and is never repeated:
        the kernel reports lost pages once, then calls them clean. `sealed` is called after each file.
        """
        with self.writing(staging):
            return seal_files(staging, [check_file_name(name) for name in names], sealed)

    def commit(
        self, step: int, attempt: int, token: str, records: List[FileRecord], meta: dict[str, Any]
    ) -> Checkpoint:
        """Turn the staging folder into the checkpoint `step`. Rank 0 only, with all ranks' records.

        When this returns, the checkpoint is durable and will be found; when it raises, the store is as before
        and the staging folder is gone. An earlier good checkpoint of the same step and attempt is kept and
        returned, and the new one dropped; one of another attempt is replaced. Raise CheckpointWriteError,
        also if a staged file is in no record, or in two, or has another size.
        """
        staging = self.staging(step, attempt, token)
        self._own = staging.parent
        files = tuple(sorted(records, key=lambda record: record.name))
        raw = encode(Manifest(step, attempt, time.time(), files, meta))
        try:
            with self.writing(staging):
                checkpoint = commit_folder(self.root, staging, records, raw)
        except CheckpointWriteError:
            self.abandon(step, attempt, token)
            raise
        point_latest(self.root, checkpoint.path, staging.parent)
        if now := fingerprint(checkpoint.path):
            self._verified[checkpoint.path] = now
        return checkpoint

    def abandon(self, step: int, attempt: int, token: str, *, hurry: bool = False) -> None:
        """Remove the staging folder. Never fails; a later begin or prune removes the rest.

        Args:
            hurry: only rename it away: on a parallel file system removal may outlast a preemption's grace.
                `make_room` or the next prune removes it.
        """
        staging = self.staging(step, attempt, token)
        if not os.path.lexists(staging):
            return
        if hurry:
            with contextlib.suppress(OSError):
                move_to_trash(staging, staging.parent, "abandon")
        else:
            discard(staging, staging.parent, "abandon")

    def make_room(self) -> None:
        """Remove folders abandoned in a hurry."""
        if self._own:
            sweep_trash(self._own, "room.sweep")

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turn an OSError into a SupersededError or a CheckpointWriteError.

        For code that writes files into the staging folder `path`: `with store.writing(folder): ...`. A
        RuntimeError, which torch.save raises for file errors, passes through unless superseded.
        """
        try:
            yield
        except (OSError, RuntimeError, CheckpointWriteError) as error:
            own = path if path.parent == self.root else path.parent
            if fence.explains(error, self.root, own):
                raise fence.superseded(self.root, own) from error
            if isinstance(error, OSError):
                raise write_error(path, error) from error
            raise

    # Reading

    def list(self) -> List[Checkpoint]:
        """Return the checkpoints with a readable manifest, newest step first. Their files are not read."""
        return [found.checkpoint for found in self.survey() if found.checkpoint]

    def survey(self) -> Iterator[Candidate]:
        """Yield every `step-*` folder, newest step first, readable or not."""
        try:
            names = [path.name for path in self.root.iterdir()]
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise StateError(f"{self.root} cannot be listed: {error.strerror}") from None
        steps = sorted(((step, name) for name in names if (step := step_of(name)) is not None), reverse=True)
        return (examine(self.root / name) for _, name in steps)

    def verify(
        self,
        checkpoint: Checkpoint,
        names: Iterable[str] | None = None,
        read: Callable[[], object] = lambda: None,
    ) -> List[str]:
        """Return the problems, each naming its file; empty if good. `names` limits it to a rank's share;
        `read` is called after each file.

        Only the full check (names=None) finds files missing from the manifest; with shares the layout must be
        verified once besides. `newest_verified` does both.
        """
        if names is not None:
            return find_problems(checkpoint, names, read)
        before = fingerprint(checkpoint.path)
        problems = find_problems(checkpoint, read=read)
        self._note_verified(checkpoint, before, problems)
        return problems

    def newest_verified(
        self, ranks: Ranks = ALONE, report: Callable[[str], object] = _log.warning, below: int | None = None
    ) -> Checkpoint | None:
        """Return the newest checkpoint whose every byte verifies; None if there are no folders.

        Collective: rank 0 lists, each rank reads its share of the files, and all return, or raise, the same.
        A newer bad one is left as it is. Raise NoUsableCheckpointError if there are checkpoint folders and
        none verifies, StateError if the checkpoint folder cannot be listed.

        Args:
            report: called on rank 0 with a line for each one skipped, naming the file and its problem.
            below: only those of earlier steps than this.
        """
        passed_over = []
        for found in self._survey_together(ranks):
            if below is not None and found.step >= below:
                continue
            problems = [found.problem]
            if found.checkpoint:
                problems = self._verify_together(found.checkpoint, ranks)
            if found.checkpoint and not problems:
                if ranks.rank == 0 and below is None:
                    self._compare_hint(found.path, report)
                return found.checkpoint
            passed_over.append(f"{found.path.name}: {_summary(problems)}")
            if ranks.rank == 0:
                report(f"checkpoint not usable, trying an older one: {passed_over[-1]}")
        if not passed_over:
            return None
        raise NoUsableCheckpointError(
            f"no checkpoint can be used, of {len(passed_over)} in {self.root}: restore one, or move these "
            "folders away to start from the beginning\n  " + "\n  ".join(passed_over)
        )

    def _survey_together(self, ranks: Ranks) -> List[Candidate]:
        """Return rank 0's listing on all ranks: ranks that list by themselves could see different folders."""
        found: Any = None
        if ranks.rank == 0:
            try:
                found = list(self.survey())
            except StateError as error:
                found = str(error)
        found = ranks.broadcast(found)
        if isinstance(found, str):
            raise StateError(found)
        candidates: List[Candidate] = found
        return candidates

    def _verify_together(self, checkpoint: Checkpoint, ranks: Ranks) -> List[str]:
        before = fingerprint(checkpoint.path) if ranks.rank == 0 else None
        share = checkpoint.manifest.share(ranks.rank, ranks.world_size)
        problems = self.verify(checkpoint, share, ranks.beat)
        if ranks.rank == 0:
            problems += find_layout_problems(checkpoint)  # files in no rank's share
        # Sorted, each once: every rank reports a damaged manifest.
        together = sorted({problem for part in ranks.gather(problems) for problem in part})
        self._note_verified(checkpoint, before, together)
        return together

    def _note_verified(self, checkpoint: Checkpoint, before: Fingerprint | None, problems: List[str]) -> None:
        """Remember a verification for prune. `before` is the fingerprint from before it, or None."""
        self._verified.pop(checkpoint.path, None)
        if before and not problems:
            self._verified[checkpoint.path] = before

    def _compare_hint(self, newest: Path, report: Callable[[str], object]) -> None:
        hint = self.root / LATEST
        try:
            with hint.open("rb") as file:
                named = file.read(64).decode(errors="replace").strip()
        except OSError:
            named = ""
        if named != newest.name:
            report(f"{hint} names {named!r}; using {newest.name}, the newest that verifies")

    # Retention

    def prune(self, protect: Collection[int], *, at: int | None = None, hurry: bool = False) -> List[int]:
        """Remove checkpoints older than the `keep` (checkpoint.keep) newest verified ones; return the steps.

        Steps in `protect` stay. With fewer than `keep` verified ones nothing is removed. A checkpoint that
        this object committed or verified counts as verified while its files' fingerprint is unchanged; others
        are read in full. Also removes what dead incarnations left. A kill leaves each checkpoint complete or
        gone.

        Args:
            at: this attempt's step. Checkpoints of later steps neither count nor go: this attempt skipped
                them, so they may verify and still be of no use.
            hurry: read nothing, so a checkpoint not known to be good counts as bad; and delete nothing:
                rename into the incarnation's own folder, which the next `begin` removes. On a parallel file
                system deleting takes longer than a grace period.
        """
        scope = self._own or self.root
        with self.writing(scope):
            if self._own:
                fence.check(self._own)
            removed = []
            for step in self._expendable(at, reads=not hurry):
                if step in protect:
                    continue
                removed.append(step)
                trash = move_to_trash(self.root / step_folder(step), scope, "prune")
                if trash is not None and not hurry:
                    remove_tree(trash, "prune")
            if not hurry:
                self._sweep()
        return removed

    def prune_surplus(self, at: int) -> List[int]:
        """Prune if there are two or more checkpoints beyond `keep`: killed attempts leave extra ones."""
        return self.prune([at], at=at) if len(list(self.survey())) > self.keep + 1 else []

    def _expendable(self, at: int | None, *, reads: bool) -> List[int]:
        """Return the steps older than the `keep` newest verified ones, of those up to `at`, oldest first."""
        good = 0
        older = []
        for found in self.survey():
            if at is not None and found.step > at:
                continue
            if good >= self.keep:
                older.append(found.step)
            elif found.checkpoint:
                known = self._verified.get(found.path)
                is_known = known is not None and known == fingerprint(found.path)
                if is_known or (reads and not self.verify(found.checkpoint)):
                    good += 1
        return older[::-1]

    def sweep(self, attempt: int) -> None:
        """Remove hidden trash and what dead incarnations left: the run is over, so no `begin` will."""
        with contextlib.suppress(OSError):
            self._sweep()
        self.drop_unfinished(attempt)

    def drop_unfinished(self, attempt: int) -> None:
        """Remove what attempts up to this one left unfinished or only hidden. Never fails.

        Their ranks are gone. `begin` removes it too, unless a full disk leaves no room for its own folder.
        """
        with contextlib.suppress(OSError):
            for number, _, folder in fence.incarnations(self.root):
                if number > attempt:
                    break  # begun meanwhile
                for staging in folder.glob("step-*"):
                    discard(staging, folder, "unfinished")
                sweep_trash(folder, "unfinished")

    def _sweep(self) -> None:
        """Remove trash, and the folders of all incarnations but ours and the newest."""
        for _, _, folder in fence.incarnations(self.root)[:-1]:
            if folder != self._own:
                discard(folder, self.root, "prune.sweep")
        sweep_trash(self.root, "prune.sweep")
        if self._own:
            sweep_trash(self._own, "prune.sweep")


def _summary(problems: List[str]) -> str:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
