"""Save and load a training script's state, by the library that trains: for `resume` and `steps` of run.py.

    TorchState(model=model, optimizer=optimizer)     # one rank or DDP: objects with state_dict()
    DcpState(model, optimizer)                       # FSDP2, tensor parallel: torch.distributed.checkpoint
    DeepSpeedState(engine)                           # every ZeRO stage
    AccelerateState(accelerator)                     # accelerator.save_state

Each also keeps the random streams of every rank: torch, CUDA, numpy, Python.
"""

import os
from pathlib import Path
from typing import Any

import torch

from r1hpc.base.errors import StateError
from r1hpc.client.held.streams import set_streams, streams

_TAG = "engine"


class _WithStreams:
    """Saves this rank's random streams beside what a subclass writes."""

    def save(self, folder: Path) -> None:
        self._save(folder)
        torch.save(streams(), folder / _streams_name())

    def load(self, folder: Path) -> None:
        self._load(folder)
        if (folder / _streams_name()).is_file():  # not where there are more ranks than before
            set_streams(torch.load(folder / _streams_name(), weights_only=True))

    def _save(self, folder: Path) -> None:
        raise NotImplementedError

    def _load(self, folder: Path) -> None:
        raise NotImplementedError


def _streams_name() -> str:
    return f"streams_rank_{os.environ.get('RANK', '0')}.pt"


class TorchState(_WithStreams):
    """Objects that every rank holds whole, by name: model, optimizer, scheduler, EMA weights."""

    def __init__(self, **objects: Any) -> None:
        """Each object has `state_dict()` and `load_state_dict()`."""
        self._objects = objects

    def _save(self, folder: Path) -> None:
        if os.environ.get("RANK", "0") == "0":
            torch.save({name: each.state_dict() for name, each in self._objects.items()}, folder / "state.pt")

    def _load(self, folder: Path) -> None:
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=False)
        if saved.keys() != self._objects.keys():
            raise StateError(
                f"{folder} holds {', '.join(saved)}, and this script keeps {', '.join(self._objects)}"
            )
        for name, each in self._objects.items():
            each.load_state_dict(saved[name])


class DcpState(_WithStreams):
    """A model and optimizers in torch.distributed.checkpoint: sharded, for any number of ranks."""

    def __init__(self, model: Any, optimizers: Any) -> None:
        self._model, self._optimizers = model, optimizers

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizers = get_state_dict(self._model, self._optimizers)
        return {"model": model, "optimizer": optimizers}

    def _save(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._state(), checkpoint_id=folder / "dcp")

    def _load(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        state = self._state()
        load(state, checkpoint_id=folder / "dcp")
        set_state_dict(
            self._model,
            self._optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


class DeepSpeedState(_WithStreams):
    """A DeepSpeed engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def _save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def _load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise StateError(f"DeepSpeed found nothing to load in {folder}")


class AccelerateState(_WithStreams):
    """Everything that an Accelerator prepared or registered."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def _save(self, folder: Path) -> None:
        self._accelerator.save_state(str(folder / "accelerate"))

    def _load(self, folder: Path) -> None:
        self._accelerator.load_state(str(folder / "accelerate"))
