"""Send the steps of a run to Weights & Biases, offline or live. Needs the extra `wandb`.

Only this module uses the wandb package. A run keeps its id over all its attempts. Offline, each writer leaves
one folder with all its steps, replacing earlier ones, so that `wandb sync` uploads one curve. Online the
server reports its last step, and steps up to there are left out: W&B accepts no step twice, so a repeated
step keeps its first value.

W&B's own readings (machine, packages, git, console) stay off: they would be those of the writing process. W&B
reads the key from ~/.netrc, or from its variable; nothing here handles it.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from r1hpc.base.choose_run import flat_name, full_name
from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.metrics import Step
from r1hpc.telemetry.trackers.tensorboard import scalars

_INIT_S = 40.0
"""Seconds for W&B's server to answer; W&B takes about twice that, and the keeper waits longer."""
_MOST_OF_NAME = 100
"""Characters of a run's name in its id, which may have 128."""


class WandbWriter:
    """Writes into the W&B run of one of our runs; its files are in `folder`/wandb."""

    def __init__(
        self,
        run: RunDir,
        folder: Path,
        project: str,
        entity: str | None = None,
        mode: str | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Open the W&B run; W&B lists `about` as its configuration.

        Without a `mode` (offline, online) $WANDB_MODE counts. Raise R1hpcError if the wandb package is not
        installed, or could not start: no key, no network.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's crash reports to its makers
        try:
            # Deferred: a second, and an extra.
            import wandb
        except ImportError:
            raise R1hpcError("the wandb package is not installed; run: pip install 'r1hpc[wandb]'") from None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in (folder / "wandb").glob("*run-*"):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
        settings = wandb.Settings(
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
            init_timeout=_INIT_S,
        )
        try:
            self._opened = wandb.init(
                project=project,
                entity=entity,
                mode=cast(Literal["offline", "online"] | None, mode),
                id=wandb_id(run),
                name=full_name(run),
                dir=str(folder),
                resume="allow",
                config=about,
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise R1hpcError(
                f"W&B did not start: {error}; log in with `wandb login`, or write offline and upload later "
                f"with `wandb sync {folder}/wandb/offline-run-*`"
            ) from None
        self._teardown = wandb.teardown
        self._next_step = self._opened.starting_step if self._opened.resumed else 0

    def steps(self, steps: Sequence[Step]) -> int:
        """Send the scalars of each step, ascending; return the number of steps."""
        for step in steps:
            if step.global_step >= self._next_step:
                self._opened.log(scalars(step), step=step.global_step)
        return len(steps)

    def close(self, failed: bool = False) -> None:
        """Write or upload the rest and close. W&B shows a run as `failed` until it continues."""
        self._opened.finish(exit_code=int(failed))
        self._teardown()  # W&B's own process writes the rest of the file as it ends


def wandb_id(run: RunDir) -> str:
    """Return the run's id in W&B: its name, plus a part unique among equal names in the project."""
    name = flat_name(run)[:_MOST_OF_NAME]
    try:
        with run.attempts.open("rb") as file:
            submission = file.readline()  # contains its time
    except FileNotFoundError:
        return name
    return f"{name}-{hashlib.sha256(submission).hexdigest()[:8]}"
