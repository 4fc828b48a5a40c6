"""Forbid the verifier's process to evaluate text, start programs, write or connect while it judges.

Third-party checkers evaluate answers here and there (`eval(answer)`). Our judges replace what they call; this
is the second wall. CPython reports these acts to audit hooks (PEP 578), and a hook that raises stops them. It
is no sandbox against native code or against custom code that looks for a way around it; an answer is data and
brings neither along. worker.py installs the hook and arms it for each answer.

Libraries compile code that they generate themselves, as SymPy does for polynomials. They may: SymPy with a
built-in judge, every installed library with custom code, whose author chose them.
"""

import _posixsubprocess
import ast
import collections
import contextlib
import dataclasses
import os
import re
import resource
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

_MEMORY = 2 * 2**30
_FORBIDDEN_EVENTS = frozenset(
    ("os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.kill", "os.killpg")
    + ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    + ("os.chown", "subprocess.Popen", "pty.spawn", "ctypes.dlopen", "pickle.find_class")
    + ("shutil.rmtree", "shutil.move", "shutil.copyfile", "signal.pthread_kill", "code.__new__")
)
_FORBIDDEN_PREFIXES = ("socket.", "http.", "urllib.", "ftplib.", "smtplib.", "tempfile.")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_COMPILERS = tuple(str(module.__file__) for module in (ast, collections, dataclasses, typing))
"""They compile field names and annotations, in modules imported late. ast.parse runs nothing."""
_GENERATORS = ("sympy", "mpmath")
_READS_TEXT = "/sympy/parsing/"
_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"/proc/[^/]+/(?:task/[^/]+/)?environ")
_INSTALLED = re.compile(r".*/(?:site|dist)-packages/(([^/]+).*)")


class ForbiddenError(RuntimeError):
    """An answer made a checker do what it must not do."""


def install() -> None:
    """Install the hook, once per process, and drop secrets from the environment. It cannot be removed."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    for name in filter(_SECRET.search, list(os.environ)):
        del os.environ[name]
    # No audit event reports it.
    for module, name in ((_posixsubprocess, "fork_exec"), (subprocess, "_fork_exec")):
        setattr(module, name, _refuse_to_fork)
    sys.addaudithook(_audit)


def _guard() -> tuple[
    Callable[[], AbstractContextManager[None]],
    Callable[[], bool],
    Callable[[], str | None],
    Callable[[str], None],
    Callable[[str, tuple[Any, ...]], None],
]:
    """Make the guard's functions. Their state is no attribute of this module, where custom code could reset
    it by accident or by a single line."""
    depth, refused, custom = 0, None, None
    stays_armed = False

    @contextlib.contextmanager
    def armed() -> Iterator[None]:
        """Make the forbidden acts raise ForbiddenError inside the block; with custom code from then on, since
        a thread of it may wait for the end."""
        nonlocal depth, refused, stays_armed
        if depth == 0:
            refused = None
        depth += 1
        stays_armed = custom is not None
        try:
            yield
        finally:
            depth -= 1

    def is_armed() -> bool:
        """True while an answer is judged."""
        return depth > 0

    def refused_act() -> str | None:
        """Return the last act refused since this answer's judging began: code may have caught the error."""
        return refused

    def trust_libraries_of(file: str) -> None:
        """Let installed libraries compile code, but not `file`, which is custom code, or its package."""
        nonlocal custom
        custom = _installed(file)[0]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal refused
        if (depth > 0 or stays_armed) and _forbidden(event, arguments, custom):
            place = _installed(sys._getframe(1).f_code.co_filename)[1]
            refused = f"{event} in {place}" if place else event
            raise ForbiddenError(f"{event} while an answer is judged")

    return armed, is_armed, refused_act, trust_libraries_of, audit


armed, is_armed, refused_act, trust_libraries_of, _audit = _guard()


def _forbidden(event: str, arguments: tuple[Any, ...], custom: str | None) -> bool:
    """True for a forbidden act. `custom` is the package of custom code, None without any."""
    if event == "compile":
        return not _may_compile(sys._getframe(2).f_code.co_filename, custom)
    if event == "open":
        if isinstance(arguments[0], str | bytes) and _ENVIRONMENT.match(os.fsdecode(arguments[0])):
            return True
        return bool(arguments[2] & _WRITING) if isinstance(arguments[2], int) else False
    return event in _FORBIDDEN_EVENTS or event.startswith(_FORBIDDEN_PREFIXES)


def _may_compile(file: str, custom: str | None) -> bool:
    if file in _COMPILERS or file.startswith("<frozen importlib"):
        return True
    package, _ = _installed(file)
    if custom is not None:
        return package not in ("", custom)
    return package in _GENERATORS and _READS_TEXT not in file


def _installed(file: str) -> tuple[str, str]:
    """Return the package of an installed file and its path there; empty for other files."""
    match = _INSTALLED.fullmatch(file)
    return (match[2], match[1]) if match else ("", "")


def _refuse_to_fork(*_: Any) -> int:
    raise ForbiddenError("a program started while an answer is judged")
