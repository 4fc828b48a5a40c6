"""Run one attempt: begin on the batch host, run every rank, end with a cause and the next step."""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """Make `from r1hpc import attempt` work for a training script: a call is r1hpc.client.run.attempt."""

    def __call__(self) -> Any:
        return importlib.import_module("r1hpc.client.run").attempt()


sys.modules[__name__].__class__ = _CallableModule
