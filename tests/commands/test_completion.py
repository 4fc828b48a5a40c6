"""TAB in a real bash: what `r1hpc completion bash` prints is evaluated, then the key is pressed."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1hpc import completion
from r1hpc.__main__ import COMMANDS
from tests.recorded import RecordedRun

_HARNESS = r"""
eval "$(r1hpc completion bash)"
tab() {
  COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9 COMP_WORDS=($1)
  [[ "$1" == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
  local function; function=$(complete -p "${COMP_WORDS[0]##*/}" | sed 's/.*-F \([^ ]*\) .*/\1/')
  "$function" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>/dev/null
  printf '%s\n' "${COMPREPLY[@]}"
}
"""
"""`tab LINE`: what bash's readline would be given for a line."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `r1hpc` of this checkout on the path, and a run root with a run."""
    script = tmp_path / "bin" / "r1hpc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m r1hpc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(completion, "_script", lambda: script)
    RecordedRun(tmp_path / "runs" / "long-run")
    return tmp_path


@pytest.fixture
def environment(place: Path) -> dict[str, str]:
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "R1HPC_RUN_ROOT": str(place / "runs"), "TERM": "dumb"}


@pytest.fixture
def shell_code(place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert completion.main(["bash"]) == 0
    return capsys.readouterr().out


def offered(line: str, shell_code: str, environment: dict[str, str], folder: Path) -> list[str]:
    code = _HARNESS.replace('eval "$(r1hpc completion bash)"', shell_code) + f"tab {shlex.quote(line)}"
    argv = ["bash", "--norc", "-c", code]
    done = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("r1hpc sub", ["submit"]),
        ("r1hpc submit smok", ["smoke"]),
        ("r1hpc submit --node", ["--nodelist", "--nodes"]),
        ("r1hpc submit smoke train.prec", ["train.precision="]),
        ("r1hpc submit smoke train.precision=b", ["bf16"]),
        ("r1hpc submit --cluster ex", ["example_a100"]),
        ("r1hpc status lo", ["long-run"]),
        ("r1hpc report long-run lo", ["long-run"]),
        ("r1hpc export-metrics --to p", ["prometheus"]),
        ("r1hpc shard buil", ["build"]),
        ("r1hpc nosuch x", []),
        ("r1hpc submit --executor l", ["local"]),
    ],
)
def test_what_tab_offers(
    line: str, words: list[str], shell_code: str, environment: dict[str, str], place: Path
) -> None:
    assert sorted(offered(line, shell_code, environment, place)) == words


def test_every_command_is_offered_and_answers(
    shell_code: str, environment: dict[str, str], place: Path
) -> None:
    assert sorted(offered("r1hpc ", shell_code, environment, place)) == sorted(COMMANDS)
    for name in COMMANDS:
        assert "--help" in offered(f"r1hpc {name} --he", shell_code, environment, place), name


@contextmanager
def terminal(words: list[str], environment: dict[str, str], place: Path) -> Iterator[int]:
    """A shell that a person sits at: its end of the terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execve(words[0], words, environment)
    yield fd
    os.close(fd)
    os.waitpid(pid, 0)


def read_until(fd: int, text: str, timeout_s: float = 30) -> str:
    seen, deadline = "", time.monotonic() + timeout_s
    while text not in seen:
        assert time.monotonic() < deadline, f"{text!r} did not come: {seen!r}"
        if select.select([fd], [], [], 0.2)[0]:
            seen += os.read(fd, 4096).decode(errors="replace")
    return seen


def test_the_key_completes_the_line(shell_code: str, environment: dict[str, str], place: Path) -> None:
    (place / "completion.sh").write_text(shell_code)
    with terminal(["/bin/bash", "--norc", "--noprofile", "-i"], environment, place) as fd:
        os.write(fd, b". ./completion.sh; echo rea''dy\n")
        read_until(fd, "ready\r\n")
        os.write(fd, b"r1hpc submit smok\t train.prec\tbf\t")
        read_until(fd, "r1hpc submit smoke  train.precision=bf16")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_the_key_completes_the_line_in_zsh(
    environment: dict[str, str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completion.main(["zsh"]) == 0
    (place / "completion.zsh").write_text(capsys.readouterr().out)
    zsh = str(shutil.which("zsh"))
    with terminal([zsh, "-f", "-i"], {**environment, "TERM": "dumb"}, place) as fd:
        os.write(fd, b"autoload -Uz compinit && compinit -u -D\n")
        # Twice, as a shell in a shell does.
        os.write(fd, b". ./completion.zsh; . ./completion.zsh; echo rea''dy\n")
        read_until(fd, "ready\r\n")
        os.write(fd, b"r1hpc submit smok\t")
        read_until(fd, "r1hpc submit smoke ")


def test_other_shells_have_lines_of_their_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shell, sign in (("zsh", "compdef"), ("fish", "complete --command r1hpc")):
        assert completion.main([shell]) == 0
        assert sign in capsys.readouterr().out
    with pytest.raises(SystemExit):
        completion.main(["tcsh"])
