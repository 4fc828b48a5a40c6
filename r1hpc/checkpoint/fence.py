"""One incarnation of a run may write checkpoints at a time; the file system itself refuses the others.

Slurm can requeue a job whose old processes still run on a node it lost sight of. Each incarnation
therefore stages under a folder of its own,

    <root>/.incarnation-<attempt>-<token>/step-<n>/

and `begin` of a newer one renames the older folders away before its ranks start. Everything an
incarnation does to the store is one mkdir(2) or rename(2) whose path leads through its own folder, so
it fails with ENOENT once the folder is gone: no lock, no lease, no clock. The renamed folders are then
removed, which also stops a client that goes by a cached handle instead of the path (NFS: ESTALE).

Two that begin at once: each makes its folder first and lists the others second, so at least one sees
the other; the smaller (attempt, token) gives way.
"""

import errno
import os
import re
from pathlib import Path

from r1hpc.base.names import check_name
from r1hpc.checkpoint.disk import at, discard, make_private, move_to_trash, remove_tree
from r1hpc.checkpoint.errors import SupersededError
from r1hpc.checkpoint.manifest import step_of

REPLACED_PREFIX = "replaced-"
_INCARNATION = re.compile(r"\.incarnation-(\d+)-(.+)")


def incarnation_dir(root: Path, attempt: int, token: str) -> Path:
    return root / f".incarnation-{attempt}-{check_name(token, 'incarnation token')}"


def incarnations(root: Path) -> list[tuple[int, str, Path]]:
    """(attempt, token, folder) of those present, oldest first."""
    matches = ((_INCARNATION.fullmatch(path.name), path) for path in root.glob(".incarnation-*"))
    return sorted((int(found[1]), found[2], path) for found, path in matches if found)


def sync_weights(root: Path, attempt: int, token: str) -> Path:
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
    with at("begin.fsync"):
        make_private(own)
        make_private(root)
    rivals = [(other, key, folder) for other, key, folder in incarnations(root) if folder != own]
    if any((other, key) > (attempt, token) for other, key, _ in rivals):
        discard(own, root, "begin.withdraw")
    for _, _, folder in rivals:
        if own.is_dir():
            _evict(root, folder)
    if not own.is_dir():
        raise superseded(root, own)
    return own


def explains(error: Exception, root: Path, own: Path) -> bool:
    """Whether `error` came of a newer incarnation having removed the folder `own`.

    Files may vanish one by one under a process that is just listing them, so a check that finds one
    missing counts as much as ENOENT.
    """
    if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ESTALE):
        return False
    return os.path.lexists(root) and not os.path.lexists(own)


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
    trash = move_to_trash(folder, root, "begin.evict")
    if trash is not None:
        _put_back_replaced(root, trash)
        remove_tree(trash, "begin.evict")


def _put_back_replaced(root: Path, folder: Path) -> None:
    """Undo a commit that was killed between moving a bad checkpoint out and its successor in.

    The bad one is of no use, but without it the store could look empty, that is, like a fresh start.
    """
    for replaced in folder.glob(f"{REPLACED_PREFIX}step-*"):
        name = replaced.name.removeprefix(REPLACED_PREFIX)
        if step_of(name) is not None and not (root / name).exists():
            with at("begin.put_back"):
                replaced.rename(root / name)
