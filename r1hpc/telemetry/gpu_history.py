"""What the GPUs of a node read, in numbers and as series. What a report has read no later one reads again.

    found = read_gpu_history(run.gpu_metrics("node-1"))
    found.summary.result()["gpus"]["GPU-..."]["mean_power_w"]
    all_series(read_gpus(run))

Eight GPUs leave some 60 MB of readings a day. Beside them, in metrics/gpu-<node>.folded, lie both folds as
they were after so many lines, and how far that was: they go on from there, of a live run too, as if they had
never stopped, so that each figure is the same to the last digit. The file may be removed at any time. One
that is damaged or of another version, or whose readings are not what they were in the last 4 KiB before
that point, is not used.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.base.files import iter_objects, open_plain, parse_json, write_atomic
from r1hpc.base.rundir import RunDir
from r1hpc.base.shapes import mistake
from r1hpc.telemetry.gpu_series import GpuSeries, NodeSeries
from r1hpc.telemetry.gpu_summary import NodeSummary
from r1hpc.telemetry.lines import gpu_line
from r1hpc.telemetry.summary_file import Mark, mark_of

VERSION = 1
"""Of the file, and of how the folds count."""
_WORTH_BYTES = 2**18
"""With less than this beyond what is kept, reading it again is quicker than writing the folds."""


@dataclass
class GpuHistory:
    """The lines of one file, folded."""

    summary: NodeSummary
    series: NodeSeries

    def add(self, record: dict[str, Any]) -> None:
        self.summary.add(record)
        self.series.add(record)


def read_gpu_history(path: Path) -> GpuHistory:
    """Both folds of metrics/gpu-<node>.jsonl; empty ones where there is no such file."""
    history, begin = _kept(path) or (_empty(path), 0)
    end = begin
    for at, record in iter_objects(path, begin):
        if record is not None and mistake(record, gpu_line(record)) is None:
            history.add(record)
            end = at  # what comes behind the last good line may be half written: it is read again
    if end - begin >= _WORTH_BYTES:
        _keep(path, history, end)
    return history


def read_gpus(run: RunDir) -> list[GpuHistory]:
    """Of each node that has written any."""
    return [read_gpu_history(path) for path in run.all_gpu_metrics]


def all_series(nodes: Iterable[GpuHistory]) -> list[GpuSeries]:
    """One for each GPU; none without a driver."""
    return [series for node in nodes for series in node.series.gpus.values()]


def folded_beside(path: Path) -> Path:
    """The file that keeps the folds of a node's readings."""
    return path.with_suffix(".folded")


def _empty(path: Path) -> GpuHistory:
    return GpuHistory(NodeSummary(), NodeSeries(path.stem.removeprefix("gpu-")))


def _kept(path: Path) -> tuple[GpuHistory, int] | None:
    """The folds that are kept, and where in the readings they go on; None: there are none to be used."""
    try:
        with open_plain(folded_beside(path)) as file:
            head, _, body = file.read().partition(b"\n")
        if head != _head(body):
            return None
        kept = parse_json(body)
        begin = Mark(*kept["mark"]).offset(path)
        if begin is None:
            return None
        return GpuHistory(NodeSummary.restored(kept["summary"]), NodeSeries.restored(kept["series"])), begin
    except (OSError, StateError, TypeError, KeyError):
        return None


def _keep(path: Path, history: GpuHistory, end: int) -> None:
    """Replace the file; a folder that cannot be written, or a full disk, keeps what it has."""
    mark = mark_of(path, end)
    if mark is not None:
        body = json.dumps({"mark": mark, **vars(history)}, default=_fields).encode()
        with contextlib.suppress(OSError):
            write_atomic(folded_beside(path), _head(body) + b"\n" + body)


def _head(body: bytes) -> bytes:
    """The first line of the file. Its digest tells whatever happened to the rest from what was written."""
    return f"r1hpc {VERSION} {hashlib.sha256(body).hexdigest()}".encode()


def _fields(each: Any) -> Any:
    return sorted(each) if isinstance(each, set) else vars(each)
