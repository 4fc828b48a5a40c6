"""The units of a build made by the workers of a Dask cluster, where a site has one.

    with dask_pool("tcp://head:8786") as work_off:          # or the scheduler's file
        build_dataset(recipe, out, work_off=work_off)

The units, the work folder and so the dataset are those of any other engine: this hands tasks out and waits. A
worker that dies loses the unit it was at, which Dask gives to another. Dask is the optional extra `dask`.
"""

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.data.errors import DataError
from r1hpc.data.manifest import digest
from r1hpc.data.units import Unit, WorkOff, code_hash, make_unit

_CONNECT_S = 30.0
_ONE_AT_A_TIME = threading.Lock()
"""A unit takes its process for itself, as everywhere: the libraries below keep state of their own."""


@contextlib.contextmanager
def dask_pool(scheduler: str, report: Callable[[str], None] | None = None) -> Iterator[WorkOff]:
    """What makes units on the cluster of a scheduler, given by address or by its file.

    Raises:
        R1hpcError: Dask is not installed.
        UsageError: nobody answers there.
    """
    distributed = _import_distributed()
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = distributed.Client(**where, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--scheduler {scheduler}: no Dask scheduler answers there ({error}); give its address, such as "
            "tcp://head:8786, or the file that `dask scheduler --scheduler-file` wrote"
        ) from None
    with client:
        if report:
            report(f"dask: {len(client.scheduler_info(n_workers=-1)['workers'])} workers at {scheduler}")
        yield functools.partial(_work_off, distributed, client)


def _work_off(distributed: Any, client: Any, folder: Path, units: list[Unit]) -> Iterator[Unit]:
    futures = {
        client.submit(_make, folder, unit, _code(unit), key=_name(folder, unit)): unit for unit in units
    }
    try:
        for future in distributed.as_completed(futures, loop=client.loop):
            future.result()
            yield futures[future]
    except distributed.KilledWorker as error:
        raise DataError(
            f"Dask's workers died over one unit (out of memory?): {error} What is done is kept: build "
            "again, with more memory for each worker or a smaller part_bytes"
        ) from None
    finally:
        client.cancel(list(futures))


def _name(folder: Path, unit: Unit) -> str:
    """What Dask's dashboard shows of it: units of one stage together.

    The same name is the same work to Dask, of another client too: two builds beside each other may want the
    same unit, each in its own folder.
    """
    return f"{unit.stage}-{unit.key}-{digest(str(folder.absolute()))[:8]}"


def _code(unit: Unit) -> list[Any]:
    """The code that decides the bytes of a unit: this package, and of a teacher's units package train."""
    return [code_hash(), getattr(unit.task, "made_by", None)]


def _make(folder: Path, unit: Unit, code: list[Any]) -> None:
    """On a worker: one unit, by the same code as that which named it."""
    if _code(unit) != code:
        raise DataError(
            f"the Dask worker on {socket.gethostname()} has another version of r1hpc or its libraries: start "
            "the workers in the environment of this command"
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with _ONE_AT_A_TIME:
        make_unit(folder, unit)


def _import_distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise R1hpcError("--engine dask needs Dask: pip install 'r1hpc[dask]'") from None
    return distributed
