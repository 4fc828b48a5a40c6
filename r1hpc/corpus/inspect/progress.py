"""Read a build's progress from its work folder or its dataset.

read_progress(Path("data/web"))  # {"state": "building", "stages": [{"stage": "clean", "done": 3, ...}]}
"""

import time
from pathlib import Path
from typing import Any

from r1hpc.base.files import read_json
from r1hpc.corpus.engine.work_dir import DONE, STAGES, destination_of, is_held, work_folder
from r1hpc.data.format.errors import DatasetMissingError
from r1hpc.data.format.manifest import read_manifest


def read_progress(out: Path) -> dict[str, Any]:
    """Return the state of the build for `out`: units, CPU seconds, memory, rate and time left per stage.

    The state is `done`, `building`, `stopped` (no visible lock) or `none`. Rates are the input bytes of units
    over the time in which they were finished.
    """
    folder = work_folder(destination_of(out))
    if (folder / STAGES).is_file():
        state = "building" if is_held(folder) else "stopped"
        stages = [_stage(folder, name, units) for name, units in read_json(folder / STAGES).items()]
        return {"state": state, "path": str(out), "work": str(folder), "stages": stages}
    try:
        manifest = read_manifest(out)
    except DatasetMissingError:
        return {"state": "none", "path": str(out), "stages": []}
    return {"state": "done", "path": str(out), "id": manifest.id, "stages": []}


def _stage(folder: Path, name: str, units: list[list[Any]]) -> dict[str, Any]:
    times, done_bytes, cpu_s, memory = [], 0, 0.0, 0
    for key, num_bytes in units:
        record = folder / "units" / name / key / DONE
        if key and record.is_file():
            times.append(record.stat().st_mtime)
            done_bytes += num_bytes
            found = read_json(record)
            cpu_s += found.get("cpu_s", 0.0)
            memory = max(memory, found.get("peak_memory_bytes", 0))
    span = max(times) - min(times) if len(times) > 1 else 0.0
    # The span excludes the first unit's time, so the rate excludes its bytes.
    rate = done_bytes * (len(times) - 1) / len(times) / span if span > 0 else None
    left = sum(size for _, size in units) - done_bytes
    return {
        "stage": name,
        "units": len(units),
        "done": len(times),
        "cpu_s": cpu_s,
        "peak_memory_bytes": memory or None,
        "bytes_per_second": rate,
        "left_s": left / rate if rate and len(times) < len(units) else None,
        "last_done_s_ago": max(0.0, time.time() - max(times)) if times else None,
    }
