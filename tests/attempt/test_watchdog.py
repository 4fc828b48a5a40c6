"""A rank that hangs dumps its stacks, leaves word and exits with its own status; in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1hpc.attempt.control.watchdog import EXIT_HANG

_HANGS = """
import sys, time
from r1hpc.attempt.control.watchdog import Watchdog
dog = Watchdog(3.0, lambda problem: print(problem, flush=True))
dog.start()
dog.beat("step 7")
def stuck_here(): time.sleep(60)
stuck_here()
"""
_WAITS_FOR_ONE_THAT_STOPPED = """
import time
from r1hpc.attempt.control.watchdog import Watchdog
class Peers:
    connected, failure = True, ""
    def start(self, sign): pass
    def problem(self, patience_s=None): return "no sign of life from rank 0" if patience_s == 1.0 else None
dog = Watchdog(2.0, lambda problem: print(problem, flush=True))
dog.hear(Peers())
dog.start()
dog.beat("step 7")
time.sleep(60)
"""
_WORKS = """
import time
from r1hpc.attempt.control.watchdog import Watchdog
dog = Watchdog(3.0, lambda problem: print("hung"))
dog.start()
for step in range(10):
    dog.beat(f"step {step}")
    time.sleep(0.4)
dog.stop()
time.sleep(4.0)
print("done")
"""


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_hang_is_named_with_its_phase_and_its_stack() -> None:
    done = python(_HANGS)
    assert done.returncode == EXIT_HANG
    assert "in step 7" in done.stdout
    assert "stuck_here" in done.stderr


def test_a_rank_in_a_collective_blames_the_one_that_stopped() -> None:
    done = python(_WAITS_FOR_ONE_THAT_STOPPED)
    assert (done.returncode, done.stdout) == (EXIT_HANG, "no sign of life from rank 0\n")


_HOLDS_THE_LOCK = """
import ctypes
from r1hpc.attempt.control import watchdog
watchdog._BACKSTOP_S = 1.0
dog = watchdog.Watchdog(1.0, lambda problem: print(problem, flush=True))
def stuck_in_c():
    dog.start()
    ctypes.PyDLL(None).sleep(60)
stuck_in_c()
"""


def test_a_lock_held_in_c_is_ended_by_the_other_process(tmp_path: Path) -> None:
    allowed = f"import os, resource\nos.chdir({str(tmp_path)!r})\n"
    allowed += "resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)\n"
    done = python(allowed + _HOLDS_THE_LOCK)
    assert done.returncode == -signal.SIGABRT
    assert "stuck_in_c" in done.stderr
    assert list(tmp_path.iterdir()) == []


_SUSPENDED = """
import os, signal, time
from r1hpc.attempt.control import watchdog
watchdog._BACKSTOP_S = 4.0
dog = watchdog.Watchdog(10.0, lambda problem: print(problem, flush=True))
dog.start()
dog.beat("step 1")
time.sleep(1.5)  # both watchers have looked
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1.5)  # and look again
dog.stop()
print("done", flush=True)
"""


def test_time_in_which_the_process_was_stopped_is_no_silence() -> None:
    with subprocess.Popen([sys.executable, "-c", _SUSPENDED], stdout=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(17.0)  # more than the limit and the backstop
        process.send_signal(signal.SIGCONT)
        assert process.communicate()[0] == "done\n"
    assert process.returncode == 0


_LOADS = """
import time
from r1hpc.attempt.control import watchdog
watchdog._LOADING_S = 20.0
dog = watchdog.Watchdog(1.0, lambda problem: print(problem, flush=True))
dog.start()
time.sleep(4.0)
dog.load("loading DeepSpeed")
time.sleep(4.0)
print("loaded", flush=True)
{then}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("then", "phase"),
    [
        ("dog.beat('step 1')", "step 1"),
        ("watchdog._LOADING_S = 1.0", "loading DeepSpeed"),
        # Of both loads together some eight seconds are used up, of the second one four.
        ("watchdog._LOADING_S = 6.0; dog.load('loading more')", "loading more"),
    ],
)
def test_loading_has_bounds_of_its_own(then: str, phase: str) -> None:
    done = python(_LOADS.format(then=then))
    assert done.returncode == EXIT_HANG
    loaded, problem = done.stdout.splitlines()
    assert loaded == "loaded"
    assert problem.endswith(f"s in {phase}")


def test_progress_keeps_it_quiet_and_stop_ends_it() -> None:
    done = python(_WORKS)
    assert (done.returncode, done.stdout.strip()) == (0, "done")
