"""Install the hooks (client/hooks.py) in a script that r1hpc runs; the script itself stays unchanged.

Python imports `sitecustomize` at its start; script/rank.py puts this folder on PYTHONPATH. The environment's
own `sitecustomize` is loaded as well.
"""

import importlib
import os
import sys
from pathlib import Path


def _load_the_other() -> None:
    here = Path(__file__).parent
    ours = sys.modules.pop("sitecustomize", None)
    sys.path[:] = [path for path in sys.path if Path(path) != here]
    try:
        importlib.import_module("sitecustomize")
    except ImportError:
        if ours is not None:
            sys.modules["sitecustomize"] = ours


def _is_the_script() -> bool:
    """True unless this is a wrapper that will start the script (conda run), or the script's child."""
    own, before = os.environ.get("R1HPC_CLIENT_PID", ""), sys.orig_argv[1:]
    script = os.environ.get("R1HPC_SCRIPT", "")
    before = before[: before.index(script)] if script in before else []
    values = [word for flag, word in zip(["", *before], before, strict=False) if flag in ("-X", "-W")]
    is_plain = all(word.startswith("-") for word in before if word not in values)
    return own in ("", str(os.getpid())) and is_plain


_load_the_other()
if "R1HPC_CLIENT" in os.environ:
    is_script = _is_the_script()
    if is_script:
        os.environ["R1HPC_CLIENT_PID"] = str(os.getpid())
    try:
        from r1hpc.client.hooks import install

        install(is_script)
    except Exception as error:  # another Python than ours: the script runs, as any command
        print(f"r1hpc: no support inside this interpreter ({error})", file=sys.stderr)
