"""Make Lightning's Trainer part of a run; the script stays as it is (hooks.py calls `attach`).

`Trainer.fit` resumes from the newest verified checkpoint. After each optimizer step all ranks agree; the
checkpoint is `Trainer.save_checkpoint`'s, committed by one rename, with the random streams and the running
means beside it. A resume reads the batches of the epoch once more up to its position, so that whatever draws
random numbers in the data set draws the same ones. A validation is finished before the run stops.
"""

import functools
import time
from types import ModuleType
from typing import Any

import torch

from r1hpc.attempt.control.stop import is_save_due
from r1hpc.client.held.holdings import Holdings, keeps_itself, script_globals
from r1hpc.client.held.streams import generator_states, set_generators, set_streams, streams
from r1hpc.client.run import Run, attempt

_FILE = "lightning.ckpt"
_SUMS = ("value", "cumulated_batch_size")
"""Attributes of a number that `self.log` reduces over an epoch."""


def attach(module: ModuleType) -> None:
    """Wrap `Trainer.fit` of lightning.pytorch.trainer.trainer; Lightning answers no signals."""
    original = module.Trainer.fit
    module._SignalConnector.register_signal_handlers = lambda self: None

    @functools.wraps(original)
    def fit(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if any(getattr(each, "_early_exit", False) for each in trainer.callbacks):
            return original(trainer, *args, **kwargs)  # the Tuner tries settings, and puts the model back
        run = attempt()
        run.lead("lightning")
        keeper = _Keeper(trainer, run)
        trainer.callbacks.append(keeper.callback(module))
        done = original(trainer, *args, **kwargs)
        keeper.end()
        run.finish(trainer.global_step)
        return done

    module.Trainer.fit = fit


class _Keeper:
    """One training: methods of the Trainer's loops run through those of the same name here."""

    def __init__(self, trainer: Any, run: Run) -> None:
        self._trainer, self._run = trainer, run
        self._kept: dict[str, Any] = {}
        self._began = time.monotonic()
        self._losses: list[Any] = []
        self._lr: float | None = None
        self._saves = self._leaves = False
        """A save is due: after this batch, or where the epoch ends. This process leaves after it."""
        self._recorded = 0
        """The newest step that is on record."""
        self._means: dict[str, dict[str, Any]] = {}
        """From the checkpoint, until they are logged again."""
        self._epoch_start: dict[str, Any] = {}
        """Random streams before and after an iteration of the data begins; the loaders' generators before."""
        fit_loop = trainer.fit_loop
        for owner, name, around in (
            (trainer._checkpoint_connector, "_restore_modules_and_callbacks", self._restore),
            (fit_loop, "_load_combined_loader_states", self._before_data),
            (fit_loop, "on_advance_start", self._start_epoch),
            (fit_loop, "on_advance_end", self._end_epoch),
            (fit_loop.epoch_loop, "on_run_start", self._begin_epoch),
            (fit_loop.epoch_loop, "on_advance_end", self._end_batch),
            (trainer._logger_connector, "log_metrics", self._log),
        ):
            setattr(owner, name, functools.partial(around, getattr(owner, name)))

    def callback(self, module: ModuleType) -> Any:
        """Return a Callback that listens to losses and learning rates."""
        keeper = self

        class R1hpc(module.Callback):  # type: ignore[misc, name-defined]
            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                keeper._lr = float(optimizer.param_groups[0]["lr"])

            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                if isinstance(loss, torch.Tensor):
                    keeper._losses.append(loss.detach())

        return R1hpc()

    # Resuming

    def _restore(self, original: Any, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> None:
        trains = self._trainer.state.fn == "fit"  # a test after it takes the weights that are there
        checkpoint = self._run.resume() if trains else None
        if checkpoint is None:
            original(ckpt_path, *args, **kwargs)
            return
        file = checkpoint.path / f"lightning_rank_{self._run.rank}.pt"
        if file.is_file():
            self._kept = torch.load(file, map_location="cpu", weights_only=False)
        original(str(checkpoint.path / _FILE), False)

    def _before_data(self, original: Any) -> None:
        """Called when the loaders are made and not yet iterated."""
        self._holdings = Holdings(self._roots(), self._trainer.lightning_module.modules())
        self._epoch_start = self._data_start()
        original()

    def _data_start(self) -> dict[str, Any]:
        held = self._holdings.changed(copies=True)
        return {"iterated": streams(), "generators": generator_states(*self._loaders), "held": held}

    def _roots(self) -> dict[str, Any]:
        """Return the objects that may hold what a resume needs."""
        trainer = self._trainer
        own = [
            each for each in trainer.callbacks if not keeps_itself(each) and type(each).__name__ != "R1hpc"
        ]
        roots = {f"callback {number} {type(each).__name__}": each for number, each in enumerate(own)}
        for number, loader in enumerate(self._loaders):
            roots[f"data {number}"] = getattr(loader, "dataset", None)
            roots[f"collator {number}"] = getattr(loader, "collate_fn", None)
            roots[f"sampler {number}"] = getattr(loader, "batch_sampler", None)
        roots["module"] = trainer.lightning_module
        return {**roots, "data module": getattr(trainer, "datamodule", None), **script_globals()}

    def _start_epoch(self, original: Any) -> None:
        if self._kept and not self._seen:
            set_streams(self._kept["streams"])  # the hooks of an epoch's start may draw
        original()

    def _begin_epoch(self, original: Any, fetcher: Any) -> None:
        """Put the data where the checkpoint left it."""
        trainer, kept, self._kept = self._trainer, self._kept, {}
        if kept:
            self._go_on(kept, original, fetcher)
            return
        self._means = {}
        if trainer.current_epoch > 0:
            self._epoch_start = self._data_start()
        original(fetcher)
        self._epoch_start["begun"] = streams()
        self._began = time.monotonic()

    def _go_on(self, kept: dict[str, Any], original: Any, fetcher: Any) -> None:
        loop, self._recorded = self._trainer.fit_loop.epoch_loop, self._trainer.global_step
        seen = self._seen
        start = kept["epoch_start"] if seen else {"iterated": streams(), "generators": kept["generators"]}
        set_streams(start["iterated"])
        set_generators(start["generators"], *self._loaders)
        self._holdings.restore(start.get("held", {}))
        iter(fetcher)
        self._epoch_start = {"begun": streams(), **start}
        set_streams(self._epoch_start["begun"])
        for _ in range(seen):
            next(fetcher)
        fetched = fetcher.fetched
        original(fetcher)  # does not iterate again while it is resuming
        fetcher.fetched = fetched
        self._holdings.restore(kept.get("held", {}))
        loop.restarting = self._trainer.fit_loop._restarting = False  # go on as if nothing had happened
        if seen:
            set_streams(kept["streams"])
            self._means = kept["means"]
        self._began = time.monotonic()

    @property
    def _seen(self) -> int:
        """Batches of this epoch that were used."""
        return int(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    @property
    def _loaders(self) -> list[Any]:
        return list(self._trainer.fit_loop._combined_loader.flattened)

    def end(self) -> None:
        """Let the script draw on as it would have, if it resumed after the last step."""
        if self._kept:
            set_streams(self._kept["streams"])

    # Steps

    def _log(self, original: Any, metrics: Any, *args: Any, **kwargs: Any) -> None:
        self._run.record(self._trainer.global_step, metrics)
        original(metrics, *args, **kwargs)

    def _add_means(self) -> None:
        """Add what was added up before the resume, once a number is logged again."""
        results = self._trainer.fit_loop.epoch_loop._results
        for key in self._means.keys() & results.keys():
            metric, saved = results[key], self._means.pop(key)
            is_extreme = metric.meta.is_max_reduction or metric.meta.is_min_reduction
            combine = metric.meta.reduce_fx if is_extreme else torch.add
            for name, value in saved.items():
                now = getattr(metric, name)
                setattr(metric, name, combine(now, value.to(now.device)))

    def _end_batch(self, original: Any, fetcher: Any) -> None:
        self._add_means()
        original(fetcher)
        trainer, step = self._trainer, self._trainer.global_step
        if step == self._recorded:  # gradients are accumulated
            return
        self._recorded = step
        if self._losses:
            self._run.log(loss=float(torch.stack(self._losses).mean()))
        self._run.log(lr=self._lr)
        self._losses, now = [], time.monotonic()
        agreed = self._run.end_step(step, now - self._began)
        self._leaves |= agreed.stop
        asked = agreed.stop or agreed.save
        self._saves |= is_save_due(step, every=self._run.save_every, asked=asked)
        if not (trainer.fit_loop.epoch_loop._is_training_done or trainer.should_stop):
            self._save_if_due()
        self._began = time.monotonic()

    def _end_epoch(self, original: Any) -> None:
        original()
        if not self._saves:
            return
        loop = self._trainer.fit_loop.epoch_loop  # as the next epoch would begin
        loop.batch_progress.reset_on_run()
        loop.scheduler_progress.reset_on_run()
        loop.automatic_optimization.optim_progress.reset_on_run()
        loop.val_loop.batch_progress.total.reset()
        self._leaves = self._leaves and not self._trainer.fit_loop.done
        self._save_if_due()

    def _save_if_due(self) -> None:
        if not self._saves:
            return
        with self._run.saving(self._recorded) as folder:
            self._trainer.save_checkpoint(folder / _FILE)
            means = {  # what `self.log` has added up in this epoch
                key: {name: getattr(metric, name) for name in _SUMS if hasattr(metric, name)}
                for key, metric in self._trainer.fit_loop.epoch_loop._results.items()
                if metric.is_tensor and metric.meta.on_epoch
            }
            kept = {
                "streams": streams(),
                "generators": generator_states(*self._loaders),
                "epoch_start": self._epoch_start,
                "means": self._means | means,
                "held": self._holdings.changed(),
            }
            self._run.name_not_kept(self._holdings.not_kept)
            torch.save(kept, folder / f"lightning_rank_{self._run.rank}.pt")
        self._saves = False
        if self._leaves:
            self._run.leave(self._recorded)
