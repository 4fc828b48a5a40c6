"""Make torch.save(FILE) atomic: a kill leaves the file of before, or the new one, never half of it.

hooks.py calls `attach`. A saved file that matches script.checkpoints is recorded as a complete checkpoint.
"""

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from r1hpc.base.files import fsync_dir
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.complete import record_complete
from r1hpc.client.job import Job


def attach(serialization: ModuleType) -> None:
    """Replace `save` in torch.serialization; torch/__init__ imports it from there."""
    original, job = serialization.save, Job.current()
    if job is None:
        return
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
            with fresh.open("rb+") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
            fsync_dir(path.parent)
            if job.checkpoints and path.match(str(Path(job.checkpoints).resolve())):
                record_complete(RunDir(job.run), path)
        finally:
            fresh.unlink(missing_ok=True)

    serialization.save = save  # type: ignore[attr-defined]
