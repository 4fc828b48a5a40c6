"""Write the steps of a run for TensorBoard and for Weights & Biases. Needs their extras, and no torch.

Only this module uses the packages tensorboard and wandb. TensorBoard's scalars are at global_step:
train/loss, ..., rl/reward, ... Some completions of stage rl go with them, as text and as a table `samples`.

A W&B run keeps its id over all its attempts. Offline, each writer leaves one folder with all its steps,
replacing earlier ones, so that `wandb sync` uploads one curve. Online the server reports its last step, and
steps up to there are left out: W&B accepts no step twice, so a repeated step keeps its first value.

W&B's own readings (machine, packages, git, console) stay off: they would be those of the writing process. W&B
reads the key from ~/.netrc, or from its variable; nothing here handles it.
"""

import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from r1hpc.base.choose_run import flat_name, full_name
from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.metrics import Step, is_number
from r1hpc.telemetry.records.samples import Sample, of_step, sampled_steps, some_wrong_first

SUFFIX = ".r1hpc"
_NOT_SCALARS = frozenset({"global_step", "attempt", "time", "extra"})
_COLUMNS = ("correct", "reward", "terms", "expected", "prompt", "completion")
_MOST_SAMPLES = 4
"""Completions of a step."""
_INIT_S = 40.0
"""Seconds for W&B's server to answer; W&B takes about twice that, and the keeper waits longer."""
_MOST_OF_NAME = 100
"""Characters of a run's name in its id, which may have 128."""


class TensorBoardWriter:
    """Writes one event file into `folder`, replacing those that an earlier call left there.

    The newest of them stays, hidden by the new one: a TensorBoard that is reading it would fail.
    """

    def __init__(self, folder: Path, samples_of: RunDir | None = None) -> None:
        """Start a new event file; raise R1hpcError if the tensorboard package is not installed.

        `samples_of`: the run whose completions are shown too; None: no completions.
        """
        try:
            # Deferred: half a second, and an extra.
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise R1hpcError(
                "the tensorboard package is not installed; run: pip install 'r1hpc[tensorboard]'"
            ) from None
        self._event, self._summary, self._samples_of = event_pb2.Event, summary_pb2.Summary, samples_of
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        self._is_text = summary_pb2.SummaryMetadata(plugin_data=plugin)
        self._tensor = functools.partial(tensor_pb2.TensorProto, dtype=types_pb2.DT_STRING)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = sorted(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
        # By the Unix seconds in their names TensorBoard orders the files.
        is_kept = bool(before) and int(before[-1].name.split(".")[3]) < int(time.time())
        for old in before[:-1] if is_kept else before:
            old.unlink()
        self._writer = EventFileWriter(os.fspath(folder), filename_suffix=SUFFIX)
        # It hides the data of earlier files (plugin_event_accumulator.py).
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(step=0, session_log=start))

    def steps(self, steps: Sequence[Step]) -> None:
        """Write the scalars of each step, ascending."""
        samples = _samples(self._samples_of, steps)
        for step in steps:
            known = {tag: value for tag, value in scalars(step).items() if not math.isnan(value)}
            parts = [self._summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
            if step.global_step in samples:
                blocks = [_as_markdown(each).encode() for each in samples[step.global_step]]
                tensor = self._tensor(string_val=blocks, tensor_shape={"dim": [{"size": len(blocks)}]})
                parts.append(self._summary.Value(tag="samples", tensor=tensor, metadata=self._is_text))
            if parts:
                summary = self._summary(value=parts)
                event = self._event(wall_time=step.time or 0.0, step=step.global_step, summary=summary)
                self._writer.add_event(event)
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        self._writer.close()


def _samples(run: RunDir | None, steps: Sequence[Step]) -> dict[int, list[Sample]]:
    """Return a few completions of the steps whose completions are kept to the end."""
    if run is None:
        return {}
    kept = set(sampled_steps(run))
    found = {step.global_step: of_step(run, step, lasting=True) for step in steps if step.global_step in kept}
    return {number: some_wrong_first(samples, _MOST_SAMPLES) for number, samples in found.items() if samples}


def _as_markdown(sample: Sample) -> str:
    """Return a completion as TensorBoard renders it; indented text is not interpreted."""
    facts = ", ".join(f"{name} {value}" for name, value in zip(_COLUMNS, _row(sample)[:-2], strict=False))
    texts = ("\n".join(f"    {line}" for line in text.split("\n")) for text in _row(sample)[-2:])
    return "\n\n".join([facts, "prompt", next(texts), "completion", next(texts)])


def _row(sample: Sample) -> list[Any]:
    terms = " ".join(f"{name}={value:.3g}" for name, value in sample.terms.items())
    return [sample.correct, sample.reward, terms, sample.expected, sample.prompt, sample.completion]


def scalars(step: Step) -> dict[str, float]:
    """Return every number of a step under its tag; a stage's fields beyond those of Step are `rl/`."""
    known = {f"train/{key}": value for key, value in step._asdict().items() if key not in _NOT_SCALARS}
    extra = {f"rl/{key}": value for key, value in (step.extra or {}).items()}
    return {tag: float(value) for tag, value in {**known, **extra}.items() if is_number(value)}


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
        samples: bool = True,
    ) -> None:
        """Open the W&B run; W&B lists `about` as its configuration, and some completions with `samples`.

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
        self._wandb: Any = wandb
        self._samples_of = run if samples else None
        self._next_step = self._opened.starting_step if self._opened.resumed else 0

    def steps(self, steps: Sequence[Step]) -> None:
        """Send the scalars of each step, ascending."""
        samples = _samples(self._samples_of, steps)
        for step in steps:
            if step.global_step >= self._next_step:
                values: dict[str, Any] = scalars(step)
                if found := samples.get(step.global_step):
                    values["samples"] = self._wandb.Table(
                        columns=[*_COLUMNS], data=[_row(each) for each in found]
                    )
                self._opened.log(values, step=step.global_step)

    def close(self, failed: bool = False) -> None:
        """Write or upload the rest and close. W&B shows a run as `failed` until it continues."""
        self._opened.finish(exit_code=int(failed))
        self._wandb.teardown()  # W&B's own process writes the rest of the file as it ends


def wandb_id(run: RunDir) -> str:
    """Return the run's id in W&B: its name, plus a part unique among equal names in the project."""
    name = flat_name(run)[:_MOST_OF_NAME]
    try:
        with run.attempts.open("rb") as file:
            submission = file.readline()  # contains its time
    except FileNotFoundError:
        return name
    return f"{name}-{hashlib.sha256(submission).hexdigest()[:8]}"
