"""Name the stages a run can have, and find the workload that runs each.

Other packages add a stage through the entry point group `r1hpc.workloads`:

    [project.entry-points."r1hpc.workloads"]
    toy = "my_package.toy:WORKLOAD"
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.base.names import nearest

WORKLOADS = {
    "pretrain": "r1hpc.train.workload:SUPERVISED",
    "traces": "r1hpc.train.workload:TRACES",
    "sft": "r1hpc.train.workload:SUPERVISED",
    "rl": "r1hpc.train.workload:RL",
    "rollout": "r1hpc.train.workload:ROLLOUT",
    "generate": "r1hpc.train.workload:SAMPLING",
    "evaluate": "r1hpc.train.workload:SAMPLING",
    "serve": "r1hpc.serving.workload:SERVING",
    "script": "r1hpc.script.workload:SCRIPT",
}
"""The stages of this package. By name, so that a stage is imported only when needed."""
STAGES = tuple(WORKLOADS)
GROUP = "r1hpc.workloads"


def check_stage(stage: str) -> None:
    """Refuse a stage that nobody provides; the ConfigError names the nearest one."""
    if stage not in WORKLOADS and stage not in _others():
        known = (*STAGES, *_others())
        raise ConfigError(f"stage is {stage!r}{nearest(stage, known)}; it may be one of {', '.join(known)}")


def find_workload(stage: str) -> Any:
    """Return the workload of a stage; raise ConfigError if no package that can be imported provides it."""
    if stage in WORKLOADS:
        module, _, name = WORKLOADS[stage].partition(":")
        return getattr(import_module(module), name)
    check_stage(stage)
    return _plug_in(stage)


@functools.cache
def _plug_in(stage: str) -> "PlugIn":
    point = _others()[stage]
    try:
        return PlugIn(stage, point.load())
    except Exception as error:  # whatever is wrong in another's package costs one sentence
        raise ConfigError(f"stage {stage}: {point.value} cannot be loaded ({_described(error)})") from error


class PlugIn:
    """A workload of another package. An error in one of its methods costs one sentence that names it."""

    def __init__(self, stage: str, workload: Any) -> None:
        self._stage, self._workload = stage, workload

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._workload, name)
        if name == "run" or not callable(value) or isinstance(value, type):
            return value  # the error of a rank is the cause of its attempt's end
        return functools.partial(self._call, name, value)

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = method(*args, **kwargs)
        except R1hpcError:
            raise
        except Exception as error:
            raise PlugInError(f"stage {self._stage}: its {name}() failed ({_described(error)})") from error
        expected = getattr(self._workload, "returns", {}).get(name)
        if expected is not None and not isinstance(result, expected):
            kind = type(result).__name__
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in expected)
            raise PlugInError(f"stage {self._stage}: its {name}() returned {kind}, not {names}")
        return result


class PlugInError(R1hpcError):
    """The workload of another package does not do what the protocol says."""


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def counts_of(stage: str) -> str:
    """Return what the progress of a stage is counted in: steps, parts, or "" for neither.

    "" too if its package cannot be imported: its runs stay readable.
    """
    return str(_attribute(stage, "counts", ""))


def is_server(stage: str) -> bool:
    """True if runs of the stage answer requests until they are stopped."""
    return bool(_attribute(stage, "is_server", False))


def in_parts(stage: str) -> bool:
    """True if the stage makes its result in files of parts/."""
    return counts_of(stage) == "parts"


def trains(stage: str) -> bool:
    """True if the stage takes optimizer steps by section train, and leaves a model."""
    return bool(_attribute(stage, "trains", False))


def samples(stage: str) -> bool:
    """True if the stage samples completions from its model."""
    return bool(_attribute(stage, "samples", False))


def loads_model(stage: str) -> bool:
    """True if the stage loads or builds the model of section model."""
    return bool(_attribute(stage, "loads_model", False))


def is_rl(stage: str) -> bool:
    """True if the stage trains on completions that it samples."""
    return trains(stage) and samples(stage)


def is_supervised(stage: str) -> bool:
    """True if the stage trains on given texts."""
    return trains(stage) and not samples(stage)


def _attribute(stage: str, name: str, default: Any) -> Any:
    try:
        return getattr(find_workload(stage), name, default)
    except (ConfigError, AttributeError):
        return default


@functools.cache
def _others() -> dict[str, Any]:
    from importlib.metadata import entry_points  # scans every installed package: only when needed

    return {point.name: point for point in entry_points(group=GROUP)}
