"""A build in a process of its own, and what it leaves beside its destination."""

import os
import subprocess
import sys
from pathlib import Path

BPE = {"kind": "byte_bpe", "vocab_size": 300}


def start_build(recipe: Path, out: Path, *arguments: str, failpoint: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "r1hpc.shard", "build", str(recipe), "--out", str(out), *arguments]
    environment = os.environ | {"R1HPC_FAILPOINT": failpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def names(folder: Path) -> set[str]:
    return {path.name.partition("-")[0] if path.name[0] == "." else path.name for path in folder.iterdir()}


def done_units(folder: Path) -> dict[str, int]:
    """The finished units below a folder, with the time of their record."""
    found = folder.glob(".staging-*/units/*/*/done.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}
