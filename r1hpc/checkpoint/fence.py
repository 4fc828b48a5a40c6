"""One incarnation of a run may write checkpoints at a time; the file system itself refuses the others.

Slurm can requeue a job whose old processes still run on a node it lost sight of. Each incarnation
therefore stages under a folder of its own,

    <root>/.incarnation-<attempt>-<token>/step-<n>/

and `begin` of a newer one renames the older folders away before its ranks start. Everything an
incarnation does to the store is one mkdir(2) or rename(2) whose path leads through its own folder, so
it fails with ENOENT once the folder is gone: no lock, no lease, no clock. The renamed folders are then
removed, which also stops a client that goes by a cached handle instead of the path (NFS: ESTALE).

Some writers make the folders they miss (DeepSpeed's save: makedirs), and would so make an evicted folder
again. Two things stand against that. A plain file, the tombstone, takes the evicted folder's name, so that
such a writer fails at once. And only `begin` puts the file BEGUN into a folder: a folder without it is
nobody's, and nothing is committed from there.

Two that begin at once: each makes its folder first and lists the others second, so at least one sees
the other; the smaller (attempt, token) gives way.
"""

import errno
import os
import re
from pathlib import Path

from r1hpc.base.names import check_name
from r1hpc.checkpoint.disk import TRASH_PREFIX, at, discard, make_private, move_to_trash, remove_tree
from r1hpc.checkpoint.errors import SupersededError
from r1hpc.checkpoint.manifest import step_of

REPLACED_PREFIX = "replaced-"
BEGUN = "begun"
_EVICT_TRIES = 100
# With a tombstone in the folder's place: ENOTDIR below it, EEXIST for the folder itself.
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.EEXIST)
_INCARNATION = re.compile(r"\.incarnation-(\d+)-(.+)")


def incarnation_dir(root: Path, attempt: int, token: str) -> Path:
    return root / f".incarnation-{attempt}-{check_name(token, 'incarnation token')}"


def incarnations(root: Path) -> list[tuple[int, str, Path]]:
    """(attempt, token, folder) of those present, oldest first. Tombstones are not folders."""
    folders = (path for path in root.glob(".incarnation-*") if path.is_dir())
    matches = ((_INCARNATION.fullmatch(path.name), path) for path in folders)
    return sorted((int(found[1]), found[2], path) for found, path in matches if found)


def last_incarnation(root: Path) -> int:
    """Return the highest attempt number that an incarnation has had here; 0: there was none."""
    matches = (_INCARNATION.fullmatch(path.name) for path in root.glob(".incarnation-*"))
    return max((int(found[1]) for found in matches if found), default=0)


def take_over(root: Path, attempt: int, token: str) -> Path:
    """Make this incarnation's folder and fence every other one. Repeating it does no harm.

    Raises:
        SupersededError: a newer incarnation has begun.
        OSError: the folder cannot be made.
    """
    own = incarnation_dir(root, attempt, token)
    for other, _, folder in incarnations(root):
        if other > attempt:
            raise superseded(root, own)
        # A launch killed before it could record its attempt is started again under the same number.
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
    for trash in root.glob(f"{TRASH_PREFIX}*-incarnation-*"):  # of a begin that was killed in _evict
        _put_back_replaced(root, trash)
    if not has_begun(own):
        raise superseded(root, own)
    return own


def has_begun(own: Path) -> bool:
    """Whether `own` is the folder that `take_over` made, and not a tombstone, gone, or made again."""
    return os.path.isfile(own / BEGUN)  # noqa: PTH113 (Path.is_file raises ESTALE)


def check(own: Path) -> None:
    """Fail where `own` is not the folder that `take_over` made. Call it last before changing the store.

    If it passes, the eviction comes later than all that the caller has read and written under `own`: a
    folder made again never has BEGUN. What follows goes through the path of `own` and fails if it is
    evicted in between, unless somebody makes the folder again between the check and that one call. That
    would have to be a rank of the same incarnation, and all of them wait for rank 0 then.

    Raises:
        OSError: ENOENT, ENOTDIR or ESTALE, see `explains`.
    """
    # Opened, not only looked up: an NFS client asks the server at every open, but not at every lookup.
    (own / BEGUN).read_bytes()


def explains(error: Exception, root: Path, own: Path) -> bool:
    """Whether `error` came of a newer incarnation having removed the folder `own`.

    Files may vanish one by one under a process that is just listing them, so a check that finds one
    missing counts as much as ENOENT. So does torch's RuntimeError that a parent folder does not exist.
    """
    if isinstance(error, OSError) and error.errno not in _GONE:
        return False
    return root.is_dir() and not has_begun(own)


def superseded(root: Path, own: Path) -> SupersededError:
    """Name who took over from the incarnation whose folder is `own`."""
    attempt = _INCARNATION.fullmatch(own.name)
    number = attempt[1] if attempt else own.name
    newer = [f"attempt {other} (token {token})" for other, token, path in incarnations(root) if path != own]
    if not newer:
        return SupersededError(
            f"attempt {number} may not write checkpoints in {root}: it never began there, "
            "or a newer attempt removed its folder. Let this process end"
        )
    return SupersededError(
        f"attempt {number} may not write checkpoints in {root}: {newer[-1]} has taken over. "
        "Let this process end; the newer one goes on"
    )


def _evict(root: Path, folder: Path) -> None:
    """Rename `folder` away, put a tombstone in its place, remove what was in it."""
    trashed = []
    # A writer that makes its folders may make this one again between the rename and the tombstone. Nothing
    # can be committed from what it made, see `check`, even if we are held up or killed in between: the
    # tombstone only ends that writer sooner and spares the disk. Another turn of the loop takes another
    # makedirs, of which a save has a few for each rank; giving up after many turns does no harm either.
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
    """Make the tombstone; False where `folder` is a folder again. It stays: so may its old processes."""
    try:
        with at("begin.tombstone"):
            folder.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return not folder.is_dir()
    return True


def _put_back_replaced(root: Path, folder: Path) -> None:
    """Undo a commit that was killed between moving a checkpoint out and its successor in.

    Even a bad one: without it the store could look empty, that is, like a fresh start.
    """
    for replaced in folder.glob(f"{REPLACED_PREFIX}step-*"):
        name = replaced.name.removeprefix(REPLACED_PREFIX)
        if step_of(name) is not None and not (root / name).exists():
            with at("begin.put_back"):
                replaced.rename(root / name)
