"""Loaded by the interpreter of a script that r1hpc runs: the script itself stays unchanged.

Python imports `sitecustomize` at its start. The environment's own one is loaded as well.
"""

import importlib
import os
import sys
from pathlib import Path


def _load_the_other() -> None:
    here = Path(__file__).parent
    ours, kept = sys.modules.pop("sitecustomize", None), list(sys.path)
    sys.path[:] = [path for path in sys.path if Path(path) != here]
    try:
        importlib.import_module("sitecustomize")
    except ImportError:
        if ours is not None:
            sys.modules["sitecustomize"] = ours
    sys.path[:] = kept


_load_the_other()
# A script's children inherit the environment; in them nothing is attached.
if "R1HPC_CLIENT" in os.environ and "R1HPC_CLIENT_PID" not in os.environ:
    os.environ["R1HPC_CLIENT_PID"] = str(os.getpid())
    try:
        from r1hpc.client.hooks import install

        install()
    except Exception as error:  # another Python than ours: the script runs, as any command
        print(f"r1hpc: no support inside this interpreter ({error})", file=sys.stderr)
