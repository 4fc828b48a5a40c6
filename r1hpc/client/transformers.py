"""Make transformers' Trainer, and TRL's, part of a run; the script stays as it is (hooks.py calls `attach`).

`Trainer.train` resumes from the newest verified checkpoint. After each step all ranks agree; a checkpoint is
written by the Trainer into the store's staging folder and committed by one rename. It also holds what the
Trainer's own lack: sums since the last log, TRL's buffers, the random streams at the start of the epoch.
An evaluation that a stop interrupts, or that is due after a step that is asked to stop, is done after the
resume.
"""

import functools
import inspect
import os
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import has_length

from r1hpc.attempt.control.stop import is_save_due
from r1hpc.base.errors import UsageError
from r1hpc.client.held.fetches import Fetches
from r1hpc.client.held.holdings import Holdings, keeps_itself, script_globals
from r1hpc.client.held.streams import generator_states, set_generators, set_streams, streams
from r1hpc.client.run import Run, attempt

# After a resume vLLM holds no weights of any step, and the first step is kept by itself.
_NOT_KEPT = (("trainer", "_last_loaded_step"), ("trainer", "_initial_global_step"))
# A resumed Trainer begins with the step it resumes from: to stay at that is no sign that nothing changed.
_ALWAYS_KEPT = (("trainer", "_globalstep_last_logged"),)
_KEPT_BEST = 2


class _StopAskedError(BaseException):
    """Ends an evaluation; not an Exception, which scripts catch."""


def attach(module: ModuleType) -> None:
    """Replace `Trainer.train` of transformers.trainer."""
    original = module.Trainer.train

    @functools.wraps(original)
    def train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(trainer, "_run_epoch"):
            raise UsageError(
                "this transformers is too old for its Trainer to be resumed to the bit: take 5.24"
            )
        run = attempt()
        run.lead("transformers")
        for each in trainer.callback_handler.callbacks:  # else each attempt has a folder by its time
            if type(each).__name__ == "TensorBoardCallback" and each.logging_dir is None and run.is_job:
                each.logging_dir = f"{trainer.args.output_dir}/runs/{run.name}"
        done = original(trainer, _Keeper(trainer, run).resume() or resume_from_checkpoint, *args, **kwargs)
        run.finish(trainer.state.global_step)
        return done

    module.Trainer.train = train


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """One training: methods of the Trainer object run through those of the same name here."""

    def __init__(self, trainer: Any, run: Run) -> None:
        self._trainer, self._run = trainer, run
        self._kept: dict[str, Any] = {}
        """From the checkpoint, until training begins."""
        self._epoch_start: tuple[Any, ...] | None = None
        """The random streams, the loader's, and those of what reads the data, when this epoch began."""
        self._pass = (0, 0)
        """This pass over the data, from 0, and the batches of it that were used."""
        self._first_pass = self._opened = 0
        """The pass that this attempt began with; the loaders that were open before this pass."""
        self._resumed: dict[str, Any] = {}
        """The position of the last attempt, until this one goes on from it."""
        self._is_stream_set = False
        """The random streams are set already, by the first read after a resume."""
        self._loss: Any = 0.0
        self._recorded = 0
        """The newest step that is on record."""
        self._stops = False
        """The ranks agreed to stop before the training is done."""
        self._left_to_epoch = (False, False)
        """(evaluation, save) due at the last step of an epoch."""
        self._left_to_resume: tuple[bool, bool] | None = None
        """(evaluation, save) for the next attempt."""
        self._may_interrupt = False
        self._before_evaluation: tuple[Any, dict[Any, Any], dict[str, int]] | None = None
        """Random streams, holdings and open loaders when an evaluation began that is not over."""
        self._after_evaluation: dict[str, Any] | None = None
        """Random streams after the evaluation that the last attempt left."""
        self._staging = ""
        self._push: Any = None
        self._best: list[int] = []
        self._signature = inspect.signature(trainer._maybe_log_save_evaluate)
        names = ("training_step", "prediction_step", "_run_epoch", "_evaluate", "_maybe_log_save_evaluate")
        files = ("_save_checkpoint", "_get_output_dir", "_push_from_checkpoint", "_load_rng_state")
        for name in (*names, *files):
            around = getattr(self, f"_{name.removeprefix('_')}")
            setattr(trainer, name, functools.partial(around, getattr(trainer, name)))
        trainer.add_callback(self)

    # Resuming

    def resume(self) -> str | None:
        """Return the Trainer's folder in the newest verified checkpoint."""
        checkpoint = self._run.resume()
        if checkpoint is None:
            return None
        arguments = self._trainer.args
        arguments.restore_callback_states_from_checkpoint = True  # early stopping counts on
        arguments.eval_on_start = False
        arguments.ignore_data_skip = False
        folder = next(checkpoint.path.glob("checkpoint-*"))
        file = checkpoint.path / f"trainer_rank_{self._run.rank}.pt"
        if file.is_file():
            kept = torch.load(file, map_location=self._on_device, weights_only=False)
            self._kept = kept if kept["world_size"] == self._run.world_size else {}
        self._best = self._kept.get("best", [])
        if checkpoint.step in self._best[-1:]:
            self._show_best(folder)
        self._resumed_from = str(folder)
        return self._resumed_from

    def _on_device(self, storage: Any, place: str) -> Any:
        return storage if place == "cpu" else storage.to(self._trainer.args.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what the Trainer's checkpoint lacks; do the evaluation that the last attempt left."""
        trainer, kept, self._kept = self._trainer, self._kept, {}
        self._holdings = Holdings(self._roots(), self._saved_by_trainer(), _NOT_KEPT, _ALWAYS_KEPT)
        data = {"collator": trainer.data_collator, "data": trainer.train_dataset}
        self._fetches = Fetches(data | {"sampler": getattr(self._loader, "batch_sampler", None)})
        self._recorded = state.global_step
        self._began = time.monotonic()
        if not kept:
            return
        self._holdings.restore(kept["held"])
        # The final train_loss is a mean over all steps.
        trainer._initial_global_step = kept["initial_global_step"]
        if kept["ref_model"] is not None:
            trainer.ref_model.load_state_dict(kept["ref_model"])
        trainer._load_rng_state(self._resumed_from)
        if kept["pass"][1] == 0:  # between two passes
            set_generators(kept["generators"], self._loader)
        else:
            self._epoch_start = kept["epoch_start"]
        self._resumed, self._pass, self._opened = kept, kept["pass"], kept["opened"]["training"]
        self._fetches.drew(kept["opened"])
        control.should_training_stop = kept["stops"]
        if kept["due"] is not None:
            control.should_evaluate, control.should_save = kept["due"]
            trainer._maybe_log_save_evaluate(  # through the one below
                trainer._tr_loss, None, trainer.model_wrapped, None, state.epoch, None, time.time()
            )
            self._after_evaluation = streams()

    def _load_rng_state(self, original: Any, checkpoint: Any) -> None:
        if self._is_stream_set:
            self._is_stream_set = False
            return
        original(checkpoint)
        if self._after_evaluation is not None:
            set_streams(self._after_evaluation)

    def _run_epoch(self, original: Any, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True  # resumed after the last step
            return
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        is_sized = has_length(given["train_dataloader"])
        resumed, self._resumed = self._resumed, {}
        if resumed and not is_sized:  # the Trainer takes a stream's passes for one
            self._first_pass, given["steps_trained_in_current_epoch"] = resumed["pass"]
        if not is_sized:
            given["epoch"] += self._first_pass
            given["epochs_trained"] += self._first_pass
        used = given["steps_trained_in_current_epoch"] if resumed else 0
        now = (streams(), self._holdings.changed(copies=True)) if resumed else None
        if self._epoch_start is not None:  # the samplers draw as they did when this epoch began
            set_streams(self._epoch_start[0])
            set_generators(self._epoch_start[1], self._loader)
            self._fetches.holdings.restore(self._epoch_start[2])
        self._epoch_start = (streams(), generator_states(self._loader), self._fetches.holdings.glance())
        self._opened, self._pass = self._fetches.opened["training"], (given["epoch"], used)
        self._fetches.watch(self._loader)
        if now and used and used < resumed["position"]["count"]:
            then = functools.partial(self._go_on, *now)
            self._fetches.go_on(resumed["position"], used if is_sized else 0, then)
        original(**given)
        self._epoch_start = None

    def _go_on(self, saved_streams: dict[str, Any], held: dict[Any, Any]) -> None:
        set_streams(saved_streams)
        self._holdings.restore(held)
        self._is_stream_set = True

    def _roots(self) -> dict[str, Any]:
        """Return the objects that may hold what a resume needs."""
        trainer = self._trainer
        own = [each for each in trainer.callback_handler.callbacks if not keeps_itself(each)]
        callbacks = {
            f"callback {number} {type(each).__name__}": each
            for number, each in enumerate(own)
            if each is not self
        }
        data = {"collator": trainer.data_collator, "data": trainer.train_dataset}
        data["evaluation data"] = trainer.eval_dataset
        return {"trainer": trainer, "model": trainer.model, **data, **callbacks, **script_globals()}

    def _saved_by_trainer(self) -> list[Any]:
        trainer = self._trainer
        models = [trainer.model, trainer.model_wrapped, getattr(trainer, "ref_model", None)]
        parts = [part for model in models if isinstance(model, torch.nn.Module) for part in model.modules()]
        wrapped = [trainer.optimizer, trainer.lr_scheduler]
        inner = [getattr(each, name, None) for each in wrapped for name in ("optimizer", "scheduler")]
        return [*parts, *wrapped, *inner]

    @property
    def _loader(self) -> Any:
        return self._trainer.callback_handler.train_dataloader

    # Steps

    def _training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        self._pass = (self._pass[0], self._pass[1] + 1)
        self._loss = self._loss + loss.detach()
        return loss

    def _maybe_log_save_evaluate(self, original: Any, *args: Any, **kwargs: Any) -> None:
        """Let the Trainer log, evaluate and save: after each step, and once more after each epoch."""
        state, control = self._trainer.state, self._trainer.control
        if state.global_step != self._recorded:
            self._recorded = state.global_step
            self._end_step(self._signature.bind(*args, **kwargs).arguments)
            if float(state.epoch).is_integer() or control.should_training_stop or control.should_epoch_stop:
                # A resume from here would skip the call after the epoch: that one evaluates and saves.
                self._left_to_epoch = (control.should_evaluate, control.should_save)
                control.should_evaluate = control.should_save = False
                original(*args, **kwargs)
                return
        if not self._stops:
            self._stops = self._is_interrupted(original, *args, **kwargs)
        if self._stops:
            self._put_off_evaluation()
            original(*args, **kwargs)
            self._run.leave(state.global_step)
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._run.record(state.global_step, logs or {})

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what the epoch's last step left."""
        self._pass = (self._pass[0] + 1, 0)
        evaluates, saves = self._left_to_epoch
        self._left_to_epoch = (False, False)
        control.should_evaluate |= evaluates
        control.should_save |= saves

    def _end_step(self, values: dict[str, Any]) -> None:
        """Record the step, and agree on what to do after it; `values` are the Trainer's."""
        trainer, control, step = self._trainer, self._trainer.control, self._recorded
        loss, self._loss = float(self._loss), 0.0
        grad_norm = values.get("grad_norm")
        more = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
        if trainer.state.num_input_tokens_seen:
            more["tokens"] = int(trainer.state.num_input_tokens_seen)
        self._run.log(loss=loss, lr=values.get("learning_rate"), **more)
        agreed = self._run.end_step(step, time.monotonic() - self._began)
        self._stops = agreed.stop and not control.should_training_stop
        every = self._run.save_every if trainer.args.save_strategy == "no" else 0
        if is_save_due(step, every=every, asked=agreed.save):
            control.should_save = True

    def _is_interrupted(self, original: Any, *args: Any, **kwargs: Any) -> bool:
        """Let the Trainer log, evaluate and save; True if a stop ended its evaluation."""
        self._may_interrupt = True
        try:
            original(*args, **kwargs)
        except _StopAskedError:
            return True
        finally:
            self._may_interrupt = False
        return False

    def _put_off_evaluation(self) -> None:
        """Leave a due evaluation to the next attempt; let the Trainer save."""
        control = self._trainer.control
        if control.should_evaluate:
            self._left_to_resume = (True, control.should_save)
        control.should_evaluate, control.should_save = False, True

    def _evaluate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        opened = dict(self._fetches.opened)
        self._before_evaluation = (streams(), self._holdings.changed(copies=True), opened)
        found = original(*args, **kwargs)
        self._before_evaluation = None
        return found

    def _prediction_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        is_evaluating = self._may_interrupt and self._before_evaluation is not None
        if is_evaluating and self._run.agree().stop:
            raise _StopAskedError
        return original(*args, **kwargs)

    # Saving

    def _get_output_dir(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._staging or original(*args, **kwargs)

    def _push_from_checkpoint(self, original: Any, folder: str) -> None:
        self._push = original  # once it is committed: it is read in the background

    def _save_checkpoint(self, original: Any, *args: Any, **kwargs: Any) -> None:
        arguments, step = self._trainer.args, self._trainer.state.global_step
        before, self._before_evaluation = self._before_evaluation, None
        if before is not None:  # a stop interrupted the evaluation: as if it had not begun
            set_streams(before[0])
        with self._run.saving(step) as folder:
            self._write(folder, original, *args, **kwargs)
            self._note_best(folder / f"checkpoint-{step}")
            opened = {**(before[2] if before else self._fetches.opened), "training": self._opened}
            if self._pass[1] == 0:  # between two passes
                opened["training"] = self._fetches.opened["training"]
            held = before[1] if before else self._holdings.changed()
            kept = self._lacking() | {"held": held, "opened": opened}
            torch.save(kept, folder / f"trainer_rank_{self._run.rank}.pt")
        self._run.name_not_kept(self._holdings.not_kept)
        committed = self._run.newest_folder / f"checkpoint-{step}"
        if step in self._best[-1:]:
            self._show_best(committed)
        if self._push and arguments.should_save:
            self._push(str(committed))

    def _write(self, folder: Path, original: Any, *args: Any, **kwargs: Any) -> None:
        """Let the Trainer write its own checkpoint, the optimizer too."""
        arguments = self._trainer.args
        only_model = arguments.save_only_model
        self._staging, arguments.save_only_model = str(folder), False
        try:
            original(*args, **kwargs)
        finally:
            self._staging, arguments.save_only_model = "", only_model

    def _lacking(self) -> dict[str, Any]:
        """Return what the Trainer's checkpoint lacks."""
        trainer = self._trainer
        synced = getattr(trainer.args, "sync_ref_model", False)
        return {
            "world_size": self._run.world_size,
            "pass": self._pass,
            "position": self._resumed["position"] if self._resumed else self._fetches.position(),
            "initial_global_step": trainer._initial_global_step,
            "ref_model": trainer.ref_model.state_dict() if synced else None,
            "epoch_start": self._epoch_start,
            "generators": generator_states(self._loader),
            "due": self._left_to_resume,
            "stops": trainer.control.should_training_stop,
            "best": self._best,
        }

    def _note_best(self, written: Path) -> None:
        """If this is the best checkpoint so far, name in its state the place where it will be shown."""
        arguments, state = self._trainer.args, self._trainer.state
        if state.best_model_checkpoint != str(written):
            return
        self._best.append(state.global_step)
        state.best_model_checkpoint = str(self._best_folder(state.global_step))
        if arguments.should_save:
            state.save_to_json(str(written / "trainer_state.json"))

    def _best_folder(self, step: int) -> Path:
        return Path(self._trainer.args.output_dir) / f"checkpoint-{step}"

    def _show_best(self, committed: Path) -> None:
        """Put the best checkpoint where the Trainer looks for it at the end: the store prunes its own."""
        step = self._best[-1]
        if self._trainer.args.should_save:
            target = self._best_folder(step)
            fresh = target.with_name(f".{target.name}.tmp")
            for old in (fresh, target, *map(self._best_folder, self._best[:-_KEPT_BEST])):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(committed, fresh, copy_function=_link)
            fresh.rename(target)
        del self._best[:-_KEPT_BEST]
        self._run.agree()  # all ranks wait for it


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
