"""The frame of every command: exit status, one clear error, one JSON object."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import ConfigError, R1hpcError, StateError, UsageError


def _raising(error: BaseException) -> Callable[[Sequence[str]], int]:
    def main(argv: Sequence[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("bad flag"), 2, "error: bad flag\n"),
        (ConfigError("bad key"), 2, "error: bad key\n"),
        (StateError("torn"), 1, "error: torn\n"),
        (R1hpcError("\x1b[2Jno"), 1, "error: \N{REPLACEMENT CHARACTER}[2Jno\n"),
        (
            FileNotFoundError(2, "No such file or directory", "/x"),
            1,
            "error: No such file or directory: /x\n",
        ),
        (RuntimeError("Symlink loop from '/x'"), 1, "error: Symlink loop from '/x': name another path\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_a_user(
    capfd: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(_raising(error), [])
    assert ended.value.code == status
    assert capfd.readouterr() == ("", line)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_long_error_is_wrapped_on_a_terminal_and_its_paths_are_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = f"/{'x' * 90}"
    message = f"{path} is no run: name {'a folder ' * 10}that r1hpc made\n  as it stands {'x ' * 50}"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit):
        run_command(_raising(UsageError(message)), [])
    first, *rest, last = terminal.getvalue().splitlines()
    assert first == "error:"
    assert path in rest[0]
    assert all(len(line) <= 80 for line in rest if path not in line)
    assert last == f"  as it stands {'x ' * 50}"
    with pytest.raises(SystemExit):
        ArgumentParser(prog="r1hpc submit").parse_args([f"--{'word ' * 30}"])
    assert all(len(line) <= 80 for line in terminal.getvalue().splitlines()[-3:])


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(_raising(ZeroDivisionError()), [])


def test_a_python_without_our_packages_is_told_so() -> None:
    without_site_packages = "-S"
    argv = [sys.executable, without_site_packages, "-m", "r1hpc.submit", "jobs/smoke.yaml", "--dry-run"]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sys.executable} has no Python module ")
    assert ". .venv/bin/activate" in done.stderr


def test_a_module_of_ours_that_is_missing_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_command(_raising(ModuleNotFoundError("No module named 'r1hpc.x'", name="r1hpc.x")), [])


def test_status_and_arguments_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str]) -> int:
        print_json({"argv": list(argv)})
        return 7

    with pytest.raises(SystemExit) as ended:
        run_command(main, ["a", "--b"])
    assert ended.value.code == 7
    assert json.loads(capsys.readouterr().out) == {"argv": ["a", "--b"]}


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "from r1hpc.base.cli import run_command\n"
        "def main(argv):\n    for n in range(10**6): print(n)\n    return 0\n"
        "run_command(main, [])"
    )
    command = f"{sys.executable} -c '{code}' | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


class TestArgumentParser:
    def _parser(self) -> ArgumentParser:
        parser = ArgumentParser(prog="r1hpc submit")
        parser.add_argument("--nodes", type=int)
        parser.add_argument("job", nargs="?")
        return parser

    def test_good(self) -> None:
        assert self._parser().parse_args(["--nodes", "4", "x"]).nodes == 4

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--ndoes=4"], "did you mean '--nodes'"),
            (["--nod", "4"], "did you mean '--nodes'"),
            (["--nodes", "many"], "invalid int value: 'many'"),
            (["a", "b"], "unknown argument 'b'"),
            (["--nodes=--"], "argument --nodes: -- is no value"),
            (["--\x1b[31m"], "unknown argument"),
        ],
    )
    def test_bad(self, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as ended:
            self._parser().parse_args(argv)
        assert ended.value.code == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert "r1hpc submit --help" in shown
        assert "\x1b" not in shown


@pytest.mark.parametrize("status", [1, 2, 4])
def test_the_status_survives_a_full_disk(status: int) -> None:
    """The log is on the disk that is full: the job script still learns that no node is at fault."""
    code = (
        "import sys; from r1hpc.base.cli import run_command; from r1hpc.base.errors import R1hpcError\n"
        f"class Full(R1hpcError): exit_status = {status}\n"
        "def main(argv):\n    raise Full('the disk of the run is full')\n"
        "run_command(main, [])"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, check=False)
    assert done.returncode == status


def test_output_that_a_full_disk_does_not_take_is_a_failure() -> None:
    code = "from r1hpc.base.cli import run_command; run_command(lambda argv: print('a line') or 0, [])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert b"No space left on device: where the output goes" in done.stderr
