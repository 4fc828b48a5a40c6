"""Import and call a custom task or reward term, and turn any failure in it into one sentence.

Runs only in processes that can be killed: grading/worker.py judges, problems/user_worker.py makes questions.
"""

import ast
import contextlib
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.config.plugins import Plugin, locate
from r1hpc.tasks.sandbox import guard

Judge = Callable[[str, str, Mapping[str, Any]], Any]


class OwnCodeError(UsageError):
    """Custom code failed; the message is one sentence that says where and how."""


def load(spec: str, code: str | None) -> Any:
    """Return what `spec` names, imported from a run's frozen `code` if there is one (config.plugins.locate).
    Raise OwnCodeError if it cannot be imported, or has no such name."""
    plugin = locate(spec, Path(code) if code else None)
    sys.path.insert(0, str(plugin.root))
    try:
        module = _imported(plugin)
        _import_early(plugin.root)
    # SystemExit too: a script not meant to be imported must not end this process.
    except BaseException as error:
        raise OwnCodeError(_sentence(spec, "cannot be imported", error)) from None
    if not callable(getattr(module, plugin.name, None)):
        raise OwnCodeError(f"{spec}: {plugin.module} has no function or class {plugin.name}")
    guard.trust_libraries_of(str(module.__file__))
    return getattr(module, plugin.name)


def make_task(settings: Mapping[str, Any]) -> Any:
    """Make the custom task; OwnCodeError if its class takes other options, or has no `question`."""
    spec = settings["spec"]
    made = call(spec, load(spec, settings["code"]), **settings["options"])
    if not callable(getattr(made, "question", None)):
        raise OwnCodeError(f"{spec} has no method question(index): see docs/tasks.md")
    return made


def call(spec: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call the function and return its result. Raise OwnCodeError for any exception, SystemExit included, but
    MemoryError as it is: the memory may stay full; replace the process."""
    try:
        return function(*arguments, **options)
    except (MemoryError, OwnCodeError):
        raise
    except BaseException as error:
        what = getattr(function, "__name__", type(function).__name__)
        raise OwnCodeError(_sentence(spec, f"failed in {what}", error)) from None


def load_verdict(settings: Mapping[str, Any]) -> Judge:
    task, spec = make_task(settings), settings["spec"]

    def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
        right = call(spec, task.verdict, text, answer, metadata)
        if not isinstance(right, bool):
            raise OwnCodeError(f"{spec}: verdict gave {right!r:.60}, not True or False")
        _refuse_caught_acts(f"{spec}: verdict gave {right}")
        return right

    return judge


def load_score(settings: Mapping[str, Any]) -> Judge:
    """Return a custom reward term as a judge whose metadata is {prompt, metadata}."""
    spec = settings["spec"]
    function = load(spec, settings["code"])
    _check_takes_four(spec, function)

    def judge(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
        value = call(spec, function, metadata["prompt"], text, answer, metadata["metadata"])
        try:
            number = float(value)
        except OverflowError:
            raise OwnCodeError(f"{spec} gave a number above 1e308, not a finite number") from None
        except Exception:  # __float__ may be custom code
            raise OwnCodeError(f"{spec} gave {_shown(value)}, not a number") from None
        if not math.isfinite(number):
            raise OwnCodeError(f"{spec} gave {number}, not a finite number")
        _refuse_caught_acts(f"{spec} gave {number:g}")
        return number

    return judge


def _refuse_caught_acts(said: str) -> None:
    """Refuse a result after the code caught the guard's error, as a verdict that runs an answer inside a
    `try` does: the result says nothing about the answer."""
    act = guard.refused_act()
    if act is not None:
        raise OwnCodeError(
            f"{said} after a forbidden act while judging a completion ({act}): see docs/tasks.md"
        )


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:  # __repr__ may be custom code
        return f"a {type(value).__name__}"


def _check_takes_four(spec: str, function: Callable[..., Any]) -> None:
    """Refuse a reward term with other arguments, such as TRL's, which takes lists by name."""
    try:
        takes = inspect.signature(function)
    except (TypeError, ValueError):  # compiled code without a signature
        return
    try:
        takes.bind("", "", "", {})
    except TypeError:
        raise OwnCodeError(
            f"{spec} takes {takes}, and a reward term is called with four arguments, score(prompt, "
            "completion, answer, metadata), once for each completion: see docs/tasks.md"
        ) from None


def _imported(plugin: Plugin) -> Any:
    place = plugin.root / f"{plugin.module}.py"
    if "." in plugin.module or not place.is_file():
        return importlib.import_module(plugin.module)
    # Imported by path: a file may be named like an installed package.
    found = util.spec_from_file_location(plugin.module, place)
    assert found is not None
    assert found.loader is not None
    module = util.module_from_spec(found)
    sys.modules[plugin.module] = module
    found.loader.exec_module(module)
    return module


def _import_early(root: Path) -> None:
    """Import what functions of the user's modules import when they are called: the guard would refuse what
    NumPy and torch do then. An import that fails is left to the call, which may expect it to."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if not file.startswith(f"{root}/") or "-packages/" in file or not file.endswith(".py"):
            continue
        tree = ast.parse(Path(file).read_bytes())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in (inner for function in functions for inner in ast.walk(function)):
            if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "level", False):
                continue  # a relative one is of the user's own
            statement = ast.Module([node], [])
            with contextlib.suppress(Exception):
                exec(compile(statement, file, "exec"), {})


def _sentence(spec: str, what: str, error: BaseException) -> str:
    """Return where and how it failed, in one line; where is the last line reached in the user's own files."""
    if isinstance(error, SystemExit):
        how = f"it calls sys.exit({'' if error.code is None else repr(error.code)})"
    else:
        how = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    folder = str(Path(__file__).resolve().parents[2])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((folder, "<frozen"))
    ]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    if isinstance(error, FileNotFoundError) and not Path(str(error.filename or "/")).is_absolute():
        how += f", looked for in {Path.cwd()}"
    if isinstance(error, SyntaxError):  # its text names file and line
        where = ""
    return f"{spec} {what}: {how}{where}"
