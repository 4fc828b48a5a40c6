"""The stub libnvidia-ml.so.1 (see nvml_stub.c) and how to run a program on it.

    LD_LIBRARY_PATH=$(python -m tests.nvml_stub /tmp/stub) python -m r1hpc.monitor --once

Needs gcc. The library must be on LD_LIBRARY_PATH before the process starts, so tests use subprocesses.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub.c")
LIBRARY = "libnvidia-ml.so.1"


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
