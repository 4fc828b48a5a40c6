"""What an answer cannot make the verifier's process do, whatever checker it meets there."""

import subprocess
import sys

import pytest

_FRAME = """
import os, socket, subprocess, sys, ctypes, tempfile, ast, json
from r1hpc.tasks import guard
guard.install()
def attempt():
    {attempt}
try:
    with guard.armed():
        attempt()
except guard.ForbiddenError as error:
    print("stopped")
except MemoryError:
    print("memory")
else:
    print("done")
"""


def _outcome(attempt: str) -> str:
    code = _FRAME.format(attempt=attempt)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    "attempt",
    [
        "eval('1+1')",
        "exec('x = 1')",
        "compile('1', '<policy>', 'eval')",
        "compile('1', '', 'eval')",
        "os.system('true')",
        "subprocess.run(['true'])",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "socket.create_connection(('127.0.0.1', 9))",
        "open('/tmp/r1hpc-guard-test', 'w')",
        "os.open('/tmp/r1hpc-guard-test', os.O_CREAT | os.O_WRONLY)",
        "os.remove('/tmp/r1hpc-guard-test')",
        "os.kill(1, 0)",
        "ctypes.CDLL('libm.so.6')",
        "tempfile.mkstemp()",
    ],
)
def test_stopped(attempt: str) -> None:
    assert _outcome(attempt) == "stopped"


@pytest.mark.parametrize(
    "attempt", ["json.loads('[1]')", "ast.literal_eval('[1]')", "open('/dev/null').read()"]
)
def test_reading_goes_on(attempt: str) -> None:
    assert _outcome(attempt) == "done"


def test_memory_is_bounded() -> None:
    assert _outcome("bytearray(3 * 2**30)") == "memory"


def test_a_module_may_be_imported_while_armed() -> None:
    """Packages import their parts when they need them; those come from files, not from an answer."""
    assert _outcome("import wave, colorsys") == "done"


def test_disarmed_inside_and_armed_again() -> None:
    attempt = "\n    ".join(
        ("with guard.disarmed():", "    eval('1')", "assert guard.is_armed()", "eval('1')")
    )
    assert _outcome(attempt) == "stopped"
