"""Forbid the verifier's process to evaluate text, start programs, write or connect while it judges.

Third-party checkers evaluate answers here and there (`eval(answer)`). Our judges replace what they call; this
is the second wall. CPython reports these acts to audit hooks (PEP 578), and a hook that raises stops them. It
is no sandbox against native code; an answer is data and brings none along. worker.py installs the hook and
arms it for each answer.
"""

import collections
import contextlib
import dataclasses
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

_MEMORY = 2 * 2**30
_FORBIDDEN_EVENTS = frozenset(
    ("os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.kill", "os.killpg")
    + ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    + ("os.chown", "os.putenv", "subprocess.Popen", "pty.spawn", "ctypes.dlopen", "pickle.find_class")
    + ("shutil.rmtree", "shutil.move", "shutil.copyfile", "signal.pthread_kill", "code.__new__")
)
_FORBIDDEN_PREFIXES = ("socket.", "http.", "urllib.", "ftplib.", "smtplib.", "tempfile.")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLASS_MAKERS = (collections.__file__, dataclasses.__file__)
_armed = False
_refused: str | None = None


class ForbiddenError(RuntimeError):
    """An answer made a checker do what it must not do."""


def install() -> None:
    """Install the hook, once per process. It cannot be removed: audit hooks stay."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    sys.addaudithook(_audit)


@contextlib.contextmanager
def armed() -> Iterator[None]:
    """Make the forbidden acts raise ForbiddenError inside the block."""
    global _armed, _refused
    _armed, _refused = True, None
    try:
        yield
    finally:
        _armed = False


def is_armed() -> bool:
    """True while an answer is judged."""
    return _armed


def refused_act() -> str | None:
    """Return the last act refused since this answer's judging began: code may have caught the error."""
    return _refused


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    global _refused
    if _armed and _forbidden(event, arguments):
        _refused = event
        raise ForbiddenError(f"{event} while an answer is judged")


def _forbidden(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "compile":
        return _evaluates(arguments[1]) and not _defines_a_class()
    if event == "open":
        return bool(arguments[2] & _WRITING) if isinstance(arguments[2], int) else False
    return event in _FORBIDDEN_EVENTS or event.startswith(_FORBIDDEN_PREFIXES)


def _evaluates(filename: Any) -> bool:
    """True for text compiled to run, as in eval and exec. Modules have a path; ast.parse uses <unknown>."""
    name = os.fsdecode(filename) if isinstance(filename, str | bytes) else ""
    return name != "<unknown>" and not (name.startswith("/") and name.endswith(".py"))


def _defines_a_class() -> bool:
    """True if namedtuple or dataclass compiles methods from field names, in modules imported late."""
    return sys._getframe(3).f_code.co_filename in _CLASS_MAKERS
