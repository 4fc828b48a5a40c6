"""Start vLLM's OpenAI server without its control routes, in the interpreter that has vLLM.

    PYTHON -m r1hpc.serving.vllm_server --model DIR --host ADDRESS …        # vLLM's own options

Standard library alone, until vLLM starts.
"""

import ctypes
import os
import runpy
import signal
import sys
from importlib.util import find_spec

NO_VLLM = 78
"""Exit status if the interpreter has no vLLM: EX_CONFIG of sysexits.h."""
_SERVER = "vllm.entrypoints.openai.api_server"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Become the server."""
    if find_spec("vllm") is None:
        print(
            f"error: {sys.executable} has no vLLM: name one that has by serve.python=PYTHON", file=sys.stderr
        )
        sys.exit(NO_VLLM)
    # Die with the parent: a killed rank must not leave a server behind that holds its GPUs (prctl(2)).
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # the parent is already gone
        sys.exit(1)
    os.environ["VLLM_SERVER_DEV_MODE"] = "0"
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
