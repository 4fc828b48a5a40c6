"""python -m tests.nvml_stub DIR: build the stub there and print DIR, for LD_LIBRARY_PATH."""

import sys
from pathlib import Path

from tests.nvml_stub import build

if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    target.mkdir(parents=True, exist_ok=True)
    print(build(target))
