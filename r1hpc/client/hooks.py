"""Attach to the training library that a script imports, as soon as it does.

    install()       # in the interpreter of the script, before its first line

Each library has a module `r1hpc.client.…` with `attach(module)`, called once the library's module is loaded.
client/hook/sitecustomize.py calls `install`. The script's children only report that they train (unled.py).
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from r1hpc.client.job import Job
from r1hpc.client.start import start_streams

_ATTACHED_TO = {
    "transformers.trainer": "r1hpc.client.transformers",
    "accelerate.accelerator": "r1hpc.client.accelerate",
    "lightning.pytorch.trainer.trainer": "r1hpc.client.lightning",
    "pytorch_lightning.trainer.trainer": "r1hpc.client.lightning",
    "torch.serialization": "r1hpc.client.torch_save",
    "torch.optim.optimizer": "r1hpc.client.unled",
}
_IN_ANY_PROCESS = ("torch.optim.optimizer",)
"""Modules whose hook a child of the script, or a wrapper such as cProfile, has too."""

FOLDER = Path(__file__).parent / "hook"
"""Holds sitecustomize.py; for PYTHONPATH."""


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a library's module as Python would, and hands it to its `attach` once it is loaded."""

    def __init__(self, seeds: dict[str, Callable[[ModuleType], None]], is_script: bool) -> None:
        self._is_script = is_script
        self._loaders: dict[str, Any] = {}
        self._seeds = seeds

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        names = {*_ATTACHED_TO, *self._seeds} if self._is_script else _IN_ANY_PROCESS
        if name not in names or name in self._loaders:
            return None
        self._loaders[name] = None  # the search below comes here again
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        self._loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loaders[spec.name].create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        name, loader = module.__name__, self._loaders[module.__name__]
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = loader  # for those who read the package's files
        loader.exec_module(module)
        job = Job.current() if self._is_script else None
        if job is None and name not in _IN_ANY_PROCESS:  # a fork of the script
            return
        if name in self._seeds:
            self._seeds[name](module)
            return
        try:
            importlib.import_module(_ATTACHED_TO[name]).attach(module)
        except (AttributeError, ImportError) as error:  # another version than the ones we know
            message = f"r1hpc: no support for this {name} ({error})"
            if job and job.checkpoints is None and name not in ("torch.serialization", *_IN_ANY_PROCESS):
                # It would begin anew after each preemption, unseen.
                raise SystemExit(
                    f"{message}: take the version that docs/own-script.md names, or set script.checkpoints"
                ) from None
            print(message, file=sys.stderr, flush=True)


def install(is_script: bool = True) -> None:
    """Attach to the libraries that this process will import, and seed it. Other processes only report."""
    job = Job.current() if is_script else None
    seeds = {} if job is None or job.seed is None else start_streams(job.seed, job.rank)
    sys.meta_path.insert(0, _After(seeds, is_script))
