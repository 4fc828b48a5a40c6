"""Let only one incarnation of a run write checkpoints; the file system itself stops the others.

An incarnation is one start of an attempt, with a random token of its own. The attempt's number is not enough:
a begin that died unrecorded is repeated under it. Slurm can requeue a job while its old processes still run
on a node it lost contact with. Each incarnation therefore stages under its own folder,

    <root>/.incarnation-<attempt>-<token>/step-<n>/

and `begin` of a newer one renames the older folders away before its ranks start. Every change to the store is
one mkdir(2) or rename(2) whose path leads through the incarnation's folder, so it fails with ENOENT once the
folder is gone: no lock, no lease, no clock. The renamed folders are then removed, which also stops a client
that uses a cached handle instead of the path (NFS: ESTALE).

Some writers create missing folders (DeepSpeed's save: makedirs), and would recreate an evicted folder. Two
things prevent that. A plain file, the tombstone, takes the evicted folder's name, so the writer fails at
once. And only `begin` puts the file BEGUN into a folder: nothing is committed from a folder without it.

If two begin at once, each makes its folder first and lists the others second, so at least one sees the other;
the smaller (attempt, token) gives way.
"""

import errno
import os
import re
from pathlib import Path

from r1hpc.base.errors import StateError
from r1hpc.base.names import check_name
from r1hpc.checkpoint.disk import TRASH_PREFIX, at, discard, make_private, move_to_trash, remove_tree
from r1hpc.checkpoint.manifest import step_of

REPLACED_PREFIX = "replaced-"
BEGUN = "begun"
_EVICT_TRIES = 100
# With a tombstone in the folder's place: ENOTDIR below it, EEXIST for the folder itself.
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.EEXIST)
_INCARNATION = re.compile(r"\.incarnation-(\d+)-(.+)")


class SupersededError(StateError):
    """A newer attempt of the run has begun: this process must not write checkpoints."""


def incarnation_dir(root: Path, attempt: int, token: str) -> Path:
    return root / f".incarnation-{attempt}-{check_name(token, 'incarnation token')}"


def incarnations(root: Path) -> list[tuple[int, str, Path]]:
    """Return (attempt, token, folder) of each incarnation, oldest first. Tombstones are not folders."""
    folders = (path for path in root.glob(".incarnation-*") if path.is_dir())
    matches = ((_INCARNATION.fullmatch(path.name), path) for path in folders)
    return sorted((int(found[1]), found[2], path) for found, path in matches if found)


def last_incarnation(root: Path) -> int:
    """Return the highest attempt number of an incarnation here; 0 if there was none."""
    matches = (_INCARNATION.fullmatch(path.name) for path in root.glob(".incarnation-*"))
    return max((int(found[1]) for found in matches if found), default=0)


def take_over(root: Path, attempt: int, token: str) -> Path:
    """Make this incarnation's folder and fence off every other one. Repeating it does no harm.

    Raise SupersededError if a newer incarnation has begun, OSError if the folder cannot be made.
    """
    own = incarnation_dir(root, attempt, token)
    for other, _, folder in incarnations(root):
        if other > attempt:
            raise superseded(root, own)
        # A launch killed before recording its attempt starts again under the same number.
        if other == attempt and folder != own:
            _evict(root, folder)
    with at("begin.mkdir"):
        own.mkdir(mode=0o700, exist_ok=True)
    with at("begin.begun"):
        (own / BEGUN).touch()
        (own / BEGUN).chmod(0o600)  # whatever the umask
    with at("begin.fsync"):
        make_private(own)
        make_private(root)
    rivals = [(other, key, folder) for other, key, folder in incarnations(root) if folder != own]
    if any((other, key) > (attempt, token) for other, key, _ in rivals):
        discard(own, root, "begin.withdraw")
    for _, _, folder in rivals:
        if has_begun(own):
            _evict(root, folder)
    for trash in root.glob(f"{TRASH_PREFIX}*-incarnation-*"):  # of a begin killed in _evict
        _put_back_replaced(root, trash)
    if not has_begun(own):
        raise superseded(root, own)
    return own


def has_begun(own: Path) -> bool:
    """True if `own` is still the folder made by `take_over`: no tombstone, not gone, not recreated."""
    return os.path.isfile(own / BEGUN)  # noqa: PTH113 (Path.is_file raises ESTALE)


def check(own: Path) -> None:
    """Fail unless `own` is the folder made by `take_over`. Call it last before changing the store.

    If it passes, everything read and written under `own` so far came before any eviction: a recreated folder
    never has BEGUN. The next call uses the path of `own`, so it fails after an eviction, unless somebody
    recreates the folder between the check and that call. Only a rank of the same incarnation could, and all
    of them are waiting for rank 0 then. Raise OSError: ENOENT, ENOTDIR or ESTALE, see `explains`.
    """
    # Opened, not only looked up: an NFS client asks the server at every open, but not at every lookup.
    (own / BEGUN).read_bytes()


def explains(error: Exception, root: Path, own: Path) -> bool:
    """True if `error` happened because a newer incarnation removed the folder `own`.

    Files may vanish one by one while a process lists them, so a check that misses one counts as much as
    ENOENT. So does torch's RuntimeError that a parent folder does not exist.
    """
    if isinstance(error, OSError) and error.errno not in _GONE:
        return False
    return root.is_dir() and not has_begun(own)


def superseded(root: Path, own: Path) -> SupersededError:
    """Return an error that names the incarnation that replaced `own`."""
    attempt = _INCARNATION.fullmatch(own.name)
    number = attempt[1] if attempt else own.name
    newer = [f"attempt {other} (token {token})" for other, token, path in incarnations(root) if path != own]
    why = "it never began there, or a newer attempt removed its folder. Let this process end"
    if newer:
        why = f"{newer[-1]} has taken over. Let this process end; the newer one continues"
    return SupersededError(f"attempt {number} may not write checkpoints in {root}: {why}")


def _evict(root: Path, folder: Path) -> None:
    """Rename `folder` away, put a tombstone in its place, remove its content."""
    trashed = []
    # A writer that creates folders may recreate this one between the rename and the tombstone. Nothing can be
    # committed from it, see `check`, even if we are delayed or killed in between: the tombstone only stops
    # that writer sooner and saves disk space. Each turn of the loop uses up one makedirs, of which a save has
    # a few per rank; giving up after many turns does no harm either.
    for _ in range(_EVICT_TRIES):
        trash = move_to_trash(folder, root, "begin.evict")
        if trash is not None:
            _put_back_replaced(root, trash)
            trashed.append(trash)
        if _bury(folder):
            break
    for trash in trashed:
        remove_tree(trash, "begin.evict")


def _bury(folder: Path) -> bool:
    """Make the tombstone; False if `folder` is a folder again. It stays, as may its old processes."""
    try:
        with at("begin.tombstone"):
            folder.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return not folder.is_dir()
    return True


def _put_back_replaced(root: Path, folder: Path) -> None:
    """Undo a commit that was killed between moving the old checkpoint out and the new one in.

    Even a bad one goes back: an empty store would look like a fresh start.
    """
    for replaced in folder.glob(f"{REPLACED_PREFIX}step-*"):
        name = replaced.name.removeprefix(REPLACED_PREFIX)
        if step_of(name) is not None and not (root / name).exists():
            with at("begin.put_back"):
                replaced.rename(root / name)
