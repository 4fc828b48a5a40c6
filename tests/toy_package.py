"""Install tests/toy_stage.py and toy_trainer.py as another package, with an entry point for each stage."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

_ENTRY_POINTS = """[r1hpc.workloads]
counting = toy_stage:WORKLOAD
descending = toy_trainer:WORKLOAD
"""


def install_toy(folder: Path) -> list[str]:
    """Put the package into `folder`; return the set-up lines by which a job finds it."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    for name in ("toy_stage.py", "toy_trainer.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    return [f"export PYTHONPATH={folder}"]


def write_toy_job(
    path: Path, *, count: int, pause_s: float = 0.01, nodes: int = 1, setup: Sequence[str] = ()
) -> Path:
    """Write a job file of stage counting."""
    job = {
        "stage": "counting",
        "options": {"count": count, "pause_s": pause_s},
        "resources": {"nodes": nodes, "gpus_per_node": 0},
        "cluster": {"setup": list(setup)},
    }
    path.write_text(yaml.safe_dump(job))
    return path
