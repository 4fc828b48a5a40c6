"""The stub libnvidia-ml.so.1 (see nvml_stub.c) and how to run a program on it.

    LD_LIBRARY_PATH=$(python -m tests.nvml_stub /tmp/stub) python -m r1hpc.monitor --once

Needs gcc. The loader reads LD_LIBRARY_PATH when a process starts, so tests use subprocesses.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub.c")
LIBRARY = "libnvidia-ml.so.1"
ROOT = Path(__file__).resolve().parents[2]


def build(target_dir: Path, without: Sequence[str] = ()) -> Path:
    """Compile the stub into `target_dir` and return that folder, for LD_LIBRARY_PATH.

    Args:
        target_dir: an existing folder.
        without: functions that the library shall not export, as an older driver's.
    """
    command = ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-Wl,-soname,{LIBRARY}", "-o", str(target_dir / LIBRARY), str(SOURCE)]
    if without:
        hidden = target_dir / "hidden.map"
        hidden.write_text("{ global: *; local: " + "".join(f"{name}; " for name in without) + "};\n")
        command.append(f"-Wl,--version-script={hidden}")
    subprocess.run(command, check=True)
    return target_dir


@functools.cache
def built(*without: str) -> Path:
    """`build` in a temporary folder, once per process and set of missing functions."""
    folder = Path(tempfile.mkdtemp(prefix="nvml-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build(folder, without)


def environment(settings: str = "", library: Path | None = None, **more: str) -> dict[str, str]:
    """The environment of a process that finds the stub (or `library`'s folder) and these settings."""
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    folder = str(library or built())
    return {
        **inherited,
        "LD_LIBRARY_PATH": folder,
        "PYTHONPATH": str(ROOT),
        "R1HPC_NVML_STUB": settings,
        **more,
    }


def run_python(
    *arguments: str, settings: str = "", library: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` on the stub; `more` are further environment variables."""
    env = environment(settings, library, **more)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
