"""Make torch.save(FILE) atomic: a kill leaves the file of before, or the new one, never half of it.

hooks.py calls `attach`. A file that matches script.checkpoints is durable when `torch.save` returns, and is
recorded as a complete checkpoint. Any other file is made durable in the background.
"""

import functools
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from r1hpc.base.files import fsync_dir, fsync_file
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.complete import record_complete, record_saved
from r1hpc.client.job import Job


def attach(serialization: ModuleType) -> None:
    """Replace `save` in torch.serialization; torch/__init__ imports it from there."""
    original, job = serialization.save, Job.current()
    if job is None:
        return
    syncs = _Syncs()
    pattern = Path(job.checkpoints).resolve() if job.checkpoints else None

    def is_checkpoint(path: Path) -> bool:
        return pattern is not None and path.match(str(pattern))

    def may_become_one(path: Path) -> bool:
        if pattern is None or path.suffix != pattern.suffix:
            return False
        return path.parent.match(str(pattern.parent))

    store = RunDir(job.run).checkpoints.resolve()  # what is saved below it is committed as a whole

    @functools.wraps(original)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(f) if isinstance(f, str | os.PathLike) else None
        if path is None or (path.exists() and not path.is_file()):
            return original(obj, f, *args, **kwargs)
        path = path.resolve()  # a link stays a link
        if store in path.parents:
            return original(obj, f, *args, **kwargs)
        fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            original(obj, fresh, *args, **kwargs)
            if not (is_checkpoint(path) or may_become_one(path)):
                fresh.replace(path)
                syncs.add(path)
                return
            fsync_file(fresh)
            fresh.replace(path)
            fsync_dir(path.parent)
            (record_complete if is_checkpoint(path) else record_saved)(RunDir(job.run), path)
        finally:
            fresh.unlink(missing_ok=True)

    serialization.save = save  # type: ignore[attr-defined]


class _Syncs:
    """Makes files durable, one after another, while the script goes on."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        self._added = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        with self._added:
            self._paths.add(path)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run)
                self._thread.start()

    def _run(self) -> None:
        """Sync until nothing is left; the interpreter waits for it at its end."""
        while True:
            with self._added:
                if not self._paths:
                    self._thread = None
                    return
                paths, self._paths = self._paths, set()
            for path in paths:
                with suppress(OSError):  # removed since
                    fsync_file(path)
            for folder in {path.parent for path in paths}:
                with suppress(OSError):
                    fsync_dir(folder)
