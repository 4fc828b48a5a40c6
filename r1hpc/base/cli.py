"""Give every r1hpc command its argument parser, common flags, error messages and exit status.

Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C; an error may have its own. With --json stdout
has one JSON object and nothing else.
"""

import argparse
import contextlib
import errno
import importlib
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.names import at_home, nearest, printable
from r1hpc.base.package import extra_of, how_to_install
from r1hpc.base.tables import fit, has_colours

_MOST = 1000
"""Most characters in a line of an error message."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description that fit; refills others, and puts comments below their commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(_fitted(block, width) for block in text.strip().split("\n\n"))


def _fitted(block: str, width: int) -> str:
    lines = block.splitlines()
    if all(len(line) <= width for line in lines):
        return block
    if not block.startswith(" ") and not any(line.startswith(" ") for line in lines):
        return textwrap.fill(block, width, break_on_hyphens=False)
    fitted = []
    for line in lines:
        command, mark, comment = line.partition("  # ")
        if mark:
            fitted += [command.rstrip(), f"        {comment.strip()}"]
        elif len(line) <= width:
            fitted.append(line)
        else:
            fitted.append(textwrap.fill(line, width, subsequent_indent="        ", break_on_hyphens=False))
    return "\n".join(fitted)


def _as_typed(text: str) -> str:
    """Return `r1hpc status` for `python -m r1hpc.status` if the command was typed that way."""
    if Path(sys.argv[0]).name != "r1hpc":
        return text
    return re.sub(r"python -m r1hpc\.([a-z_]+)", lambda found: f"r1hpc {found[1].replace('_', '-')}", text)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that names the nearest known flag in errors and accepts no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        for key in ("prog", "description"):
            kwargs[key] = _as_typed(kwargs[key]) if kwargs.get(key) else kwargs.get(key)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse; an unknown flag's error names the nearest known one."""
        words = self._typed_words(args)
        return self._known(words, *self.parse_known_args(words, namespace))

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse positional arguments and flags in any order, with the same errors."""
        words = self._typed_words(args)
        return self._known(words, *self.parse_known_intermixed_args(words, namespace))

    def parse_command(self, argv: Sequence[str], launcher: str) -> tuple[Any, list[str]]:
        """Return the arguments, and overrides from a launcher's command and from the words after `--`.

        The module `launcher` reads such a command. It is imported only where one may stand.
        """
        words, overrides = split_script_words(argv)
        if any(word == "-m" or Path(word).name.startswith(("python", *LAUNCHERS)) for word in words):
            words, overrides = importlib.import_module(launcher).split_command(argv)
        return self.parse_intermixed_args(words), overrides

    def _typed_words(self, args: Sequence[str] | None) -> list[str]:
        answer_tab(self)
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, is_flag, value = word.partition("=")
            if is_flag and flag.startswith("--"):  # as a shell expands `--out ~/x`
                words.append(f"{flag}={at_home(value)}")
            else:
                words.append(word if os.environ.get("HOME") else at_home(word))
        return words

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # argparse would hand on an empty list
            self.error(f"argument {'/'.join(action.option_strings)}: -- is no value")
        return super()._get_values(action, arg_strings)

    def _known(self, words: Sequence[str], namespace: Any, unknown: Sequence[str]) -> Any:
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = nearest(unknown[0].split("=")[0], flags)
            self.error(f"unknown argument {printable(unknown[0])!r}{near}{_after_dashes(words)}")
        return namespace

    def error(self, message: str) -> NoReturn:
        message = fit(f"{self.prog}: {_short(printable(message))}", sys.stderr)
        self.exit(2, f"{message}\n(see {self.prog} --help)\n")


def offer(action: argparse.Action, completer: str) -> None:
    """Set the TAB completer of an argument that has neither choices nor files.

    It is "module:function", imported when TAB is pressed and called as function(prefix=..., **_).
    """
    module, _, name = completer.partition(":")

    def answer(**asked: Any) -> Iterable[str]:
        found: Iterable[str] = getattr(importlib.import_module(module), name)(**asked)
        return found

    action.completer = answer  # type: ignore[attr-defined]  # where argcomplete looks


def answer_tab(parser: argparse.ArgumentParser) -> None:
    """Answer and exit if a shell asks for completions; otherwise return. See r1hpc.completion."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # imported for completion only

        # Also flags that --help leaves out: their help is suppressed.
        argcomplete.autocomplete(parser, always_complete_options=False, print_suppressed=True)


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` and exit with its status; an R1hpcError becomes its message on stderr."""
    # Output fails quietly if it is closed (`>&-`) or cannot hold a character (LANG=C).
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        status = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except R1hpcError as error:
        status = _fail(_short(printable(str(error))), error.exit_status)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "r1hpc":
            raise
        status = _fail(_missing(error.name))
    except BrokenPipeError:  # `... | head` closed our stdout: not our error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        what = _what_refuses(error)
        status = _fail(f"{error.strerror or error}{': ' if what else ''}{what}")
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # of Path.resolve, which raises no OSError for it
            raise
        status = _fail(f"{printable(str(error))}: name another path")
    except KeyboardInterrupt:
        status = 130
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, on which Python would leave with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = status or 1
    sys.exit(status)


def _fail(message: str, status: int = 1) -> int:
    with contextlib.suppress(OSError):  # the log may be on the disk that is full: the status tells
        mark = "\x1b[31merror:\x1b[0m" if has_colours(sys.stderr) else "error:"
        print(f"{mark}{fit(f'error: {message}', sys.stderr).removeprefix('error:')}", file=sys.stderr)
    return status


def _what_refuses(error: OSError) -> str:
    if error.filename:
        return printable(str(error.filename))
    try:
        Path.cwd()
    except OSError:
        return "the current folder is gone: cd to another one"
    return "where the output goes" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""


def _missing(module: str) -> str:
    if extra_of(module):
        return f"this needs the package {module.split('.')[0]}: {how_to_install(module)}"
    return (
        f"{sys.executable} has no Python module {printable(module)}, which r1hpc needs: activate the "
        "environment that r1hpc was installed into (`make setup` in its clone makes one: "
        f"`. .venv/bin/activate`), or install it into this one: {sys.executable} -m pip install -e CLONE"
    )


def _short(message: str) -> str:
    """Shorten long lines of a message; the end, which names the fix, is kept."""
    lines = message.splitlines()
    return "\n".join(each if len(each) <= _MOST else f"{each[:600]} … {each[-300:]}" for each in lines)


def file_and_overrides(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the file, if any, and the KEY=VALUE overrides beside the flags. Two files are a UsageError."""
    files = [each for each in arguments if "=" not in each]
    if len(files) > 1:
        both = f"{printable(files[0])} and {printable(files[1])}"
        raise UsageError(f"two files, {both}: a run has one{_after_dashes(files)}")
    return files[0] if files else None, [each for each in arguments if "=" in each]


def _after_dashes(words: Sequence[str]) -> str:
    return ". The script's own arguments go after --" if any(each.endswith(".py") for each in words) else ""


LAUNCHERS = ("torchrun", "accelerate", "deepspeed")


def split_script_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for us, and an override with the words after `--`, which are a script's."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], [f"script.args={json.dumps(words[at + 1 :])}"]


def refuse_folder(out: Path | None) -> None:
    """Raise UsageError if --out FILE is a folder, or nothing."""
    if out is not None and (out.is_dir() or not out.name):
        raise UsageError(f"--out {printable(str(out))} is a folder: name a file, {out / 'report.html'}")


def print_json(value: Any) -> None:
    """Print the one JSON object of a --json call."""
    print(json.dumps(value))


def print_result(shown: Any, text: str, as_json: bool) -> None:
    """Print the result of a command: the one JSON object of --json, or the text for a person."""
    print(json.dumps(shown) if as_json else text)


def add_job_words(parser: argparse.ArgumentParser, metavar: str, about: str) -> None:
    """Add the arguments `words` for file_and_overrides: a job and KEY=VALUE, which TAB completes."""
    words = parser.add_argument("words", nargs="*", metavar=metavar, help=about)
    offer(words, "r1hpc.config.assets:job_words")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the --json flag, the same for all commands that have it; see print_result."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_run_root(parser: argparse.ArgumentParser) -> None:
    """Add the --run-root flag, the same for all commands that have it."""
    parser.add_argument(
        "--run-root", metavar="DIR", help="folder of the runs; default $R1HPC_RUN_ROOT or ./runs"
    )


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add the --cluster flag, which completes the names of profiles."""
    cluster = parser.add_argument(
        "--cluster", metavar="NAME", help="profile in configs/cluster/; default $R1HPC_CLUSTER"
    )
    offer(cluster, "r1hpc.config.assets:cluster_profiles")
