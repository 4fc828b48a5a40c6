"""A rank that hangs dumps its stacks, leaves word and exits with its own status; in a process of its own."""

import subprocess
import sys

from r1hpc.train.watchdog import EXIT_HANG

_HANGS = """
import sys, time
from r1hpc.train.watchdog import Watchdog
dog = Watchdog(0.5, lambda problem: print(problem, flush=True))
dog.start()
dog.beat("step 7")
def stuck_here(): time.sleep(60)
stuck_here()
"""
_WORKS = """
import time
from r1hpc.train.watchdog import Watchdog
dog = Watchdog(0.5, lambda problem: print("hung"))
dog.start()
for step in range(12):
    dog.beat(f"step {step}")
    time.sleep(0.1)
dog.stop()
time.sleep(0.8)
print("done")
"""


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )


def test_a_hang_is_named_with_its_phase_and_its_stack() -> None:
    done = python(_HANGS)
    assert done.returncode == EXIT_HANG
    assert "in step 7" in done.stdout
    assert "stuck_here" in done.stderr


def test_progress_keeps_it_quiet_and_stop_ends_it() -> None:
    done = python(_WORKS)
    assert (done.returncode, done.stdout.strip()) == (0, "done")
