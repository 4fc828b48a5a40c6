"""What an answer cannot make the verifier's process do, whatever checker it meets there."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("guard")  # its fixtures are dear

_STOPPED = [
    "eval('1+1')",
    "exec('x = 1')",
    "compile('1', '<policy>', 'eval')",
    "compile('1', '', 'eval')",
    "compile('1', '/policy.py', 'eval')",
    "compile('1', '<unknown>', 'eval')",
    "timeit.timeit('1', number=1)",
    "_sympy_parser.eval_expr('1+1', {}, {})",
    "open('/proc/self/environ')",
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
]
_DONE = [
    "json.loads('[1]')",
    "ast.literal_eval('[1]')",
    "open('/dev/null').read()",
    "sympy.cancel('(a**2 - b**2)/(a - b)')",  # SymPy generates code for each ring
    "__import__('wave')",  # it makes a namedtuple; packages import their parts late
]
_MEMORY = "bytearray(3 * 2**30)"

_PROGRAM = """
import ast, ctypes, json, os, socket, subprocess, sys, tempfile, timeit
import sympy
from sympy.parsing import sympy_parser as _sympy_parser
from r1hpc.tasks.grading.algebra import replace_parse_expr
from r1hpc.tasks.sandbox import guard

def outcome(attempt):
    try:
        with guard.armed():
            attempt()
    except guard.ForbiddenError:
        return "stopped"
    except MemoryError:
        return "memory"
    return "done"

attempts = {text: eval("lambda: " + text) for text in json.loads(sys.argv[1])}
replace_parse_expr()
guard.install()
print(json.dumps({text: outcome(attempt) for text, attempt in attempts.items()}))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """All in one process: a guard cannot be taken off again."""
    command = [sys.executable, "-c", _PROGRAM, json.dumps([*_STOPPED, *_DONE, _MEMORY])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    outcomes: dict[str, str] = json.loads(said)
    return outcomes


@pytest.mark.parametrize("attempt", _STOPPED)
def test_stopped(outcomes: dict[str, str], attempt: str) -> None:
    assert outcomes[attempt] == "stopped"


@pytest.mark.parametrize("attempt", _DONE)
def test_what_checkers_need_goes_on(outcomes: dict[str, str], attempt: str) -> None:
    assert outcomes[attempt] == "done"


def test_memory_is_bounded(outcomes: dict[str, str]) -> None:
    assert outcomes[_MEMORY] == "memory"
