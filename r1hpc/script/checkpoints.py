"""Find the checkpoints that a script writes by itself (`script.checkpoints`) and that are complete.

    Watcher(run, config).look()          # rank 0, every few seconds
    newest_checkpoint(run, config)       # for {checkpoint}: the run's own store first

No script announces that a folder is complete. It counts once it did not change for ten seconds while the
script ran, or when the script ended by itself. A file counts once torch.save returned (client/torch_save.py),
under the name that it was given afterwards too.
"""

import time
from contextlib import suppress
from pathlib import Path

from r1hpc.base.errors import StateError
from r1hpc.base.files import read_object, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.complete import Print, print_of, record_complete, recorded, saved
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.schema.run import RunConfig

_QUIET_S = 10.0


class Watcher:
    """Records each checkpoint of the script once it is complete."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self._run, self._config = run, config
        self._seen: dict[Path, tuple[Print, float]] = {}
        self._recorded = recorded(run)

    def look(self, is_over: bool = False) -> None:
        """Look at all of them. `is_over`: the script ended by itself, so all are complete."""
        now, found_now, renamed = time.monotonic(), [], saved(self._run)
        with suppress(StateError):  # the script removes old ones at this moment
            found_now = written(self._run, self._config)
        for path, found in found_now:
            if self._recorded.get(str(path)) == found:
                continue
            before, since = self._seen.get(path, (None, now))
            if before != found:
                self._seen[path], since = (found, now), now
            if is_over or found in renamed or now - since >= _QUIET_S:
                record_complete(self._run, path)
                self._recorded[str(path)] = found


def newest_checkpoint(run: RunDir, config: RunConfig) -> Path | None:
    """Return the newest complete checkpoint: a committed one, else one of the script's own."""
    for checkpoint in CheckpointStore(run.checkpoints).list():
        inner = [path for path in checkpoint.path.iterdir() if path.is_dir()]
        return inner[0] if len(inner) == 1 else checkpoint.path
    marks, renamed = recorded(run), saved(run)
    complete = [path for path, m in written(run, config) if marks.get(str(path)) == m or m in renamed]
    return complete[-1] if complete else None


def note_earlier(run: RunDir, config: RunConfig) -> None:
    """Remember the checkpoints that lie there before the first attempt: another run wrote them."""
    if not _earlier(run).exists():
        write_json(_earlier(run), {str(path): found for path, found in written(run, config)})


def pattern_of(run: RunDir, config: RunConfig) -> str | None:
    """Return `script.checkpoints` as an absolute pattern; None if nothing is set."""
    pattern = config.script.checkpoints
    return pattern and str(Path(config.script.cwd or ".", pattern.replace("{run}", str(run.path))))


def written(run: RunDir, config: RunConfig) -> list[tuple[Path, Print]]:
    """Return the files and folders of this run that the pattern matches, oldest first.

    Raise StateError if the disk fails, or one is removed meanwhile.
    """
    pattern, earlier, found = pattern_of(run, config), read_object(_earlier(run)), []
    try:
        for match in Path("/").glob(pattern.lstrip("/")) if pattern else ():
            path = match.resolve()
            content = print_of(path)
            if content and content[0] and earlier.get(str(path)) != list(content):
                found.append((path, content))
    except OSError as error:
        raise StateError(f"cannot read the checkpoints {pattern}: {error.strerror}") from None
    return sorted(found, key=lambda each: each[1][2])


def _earlier(run: RunDir) -> Path:
    return run.path / "script-before.json"
