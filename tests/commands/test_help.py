"""What every command does before anything is asked of it: --help, --version, names that are not there.

How long --help takes follows from what it imports, so that is held here: arguments are read first, and what
an answer needs is imported for it.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from r1hpc import __version__
from r1hpc.__main__ import ALIASES, COMMANDS

ROOT = Path(__file__).parents[2]
_MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"
_HELP = """
import json, runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code, ended.code
print("\\n" + json.dumps(sorted(sys.modules)))
"""
_SLOW = {
    "asyncio",
    "concurrent",
    "email",
    "http",
    "multiprocessing",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "xml",
}
_MAY_LOAD = {
    "submit": ("r1hpc.slurm",),  # its flags are those of slurm.flags
    "sweep": ("r1hpc.slurm",),
    "serve": ("r1hpc.slurm",),
    "shard": ("r1hpc.slurm",),
    "estimate": ("r1hpc.plan", "r1hpc.config"),  # precisions, defaults
}
"""Beside r1hpc.base: packages that say which flags there are, and what they default to."""


def run(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False)


def modules_after(code: str) -> set[str]:
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@cache
def modules_of_python() -> set[str]:
    """What runs before any of ours, site hooks of the environment included."""
    return modules_after(_MODULES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_little(command: str) -> None:
    module = f"r1hpc.{command.replace('-', '_')}"
    loaded = modules_after(_HELP.format(module=module)) - modules_of_python()
    foreign = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"r1hpc"}
    assert not foreign, f"{command} --help imports {foreign}"
    allowed = ("r1hpc.base", module, *_MAY_LOAD.get(command, ()))
    ours = {name for name in loaded if name.startswith("r1hpc.") and not name.startswith(allowed)}
    assert not ours, f"{command} --help imports {ours}: import it once the arguments are read"
    if command not in ("monitor", "cancel"):
        assert not loaded & _SLOW


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_fewer_modules_than_submitit(command: str) -> None:
    submitit = modules_after(f"import submitit; {_MODULES}")
    assert len(modules_after(_HELP.format(module=f"r1hpc.{command.replace('-', '_')}"))) < len(submitit)


def test_importing_r1hpc_imports_nothing_else() -> None:
    loaded = modules_after(f"import r1hpc; {_MODULES}") - modules_of_python()
    assert {name for name in loaded if not name.startswith(("json", "r1hpc"))} <= {"__future__"}
    assert {name for name in loaded if name.startswith("r1hpc")} == {"r1hpc"}


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    done = run("-m", "r1hpc", flag)
    assert (done.returncode, done.stdout) == (0, f"r1hpc {__version__}\n")


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_every_command_is_listed_with_its_purpose(argv: tuple[str, ...]) -> None:
    done = run("-m", "r1hpc", *argv)
    assert done.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert {**lines, "launch": COMMANDS["launch"]} == COMMANDS
    headings = [line for line in done.stdout.splitlines()[1:] if line and not line.startswith(" ")]
    assert headings == ["Run:", "GPU-hours:", "Check:", "Data and models:", "Tools:"]
    files = {path.stem.replace("_", "-") for path in (ROOT / "r1hpc").glob("*.py")}
    assert set(lines) == files - {"--init--", "--main--", "api", "launch"}


def test_words_of_other_tools_lead_to_the_command(tmp_path: Path) -> None:
    done = run("-m", "r1hpc", "ls", "--run-root", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"no runs under {tmp_path}\n")
    assert done.stderr == "r1hpc ls is: r1hpc status --all\n"
    for alias, (command, *_) in ALIASES.items():
        assert alias not in COMMANDS
        assert command in COMMANDS
    done = run("-m", "r1hpc", "resume", "nothing", "--run-root", str(tmp_path))
    assert "nothing" in done.stderr
    assert done.returncode == 2
    done = run("-m", "r1hpc", "resume", f"{tmp_path}/c4/")
    assert done.returncode == 2
    assert f"no run at {tmp_path}/c4" in done.stderr


def test_flags_of_sbatch_have_a_help_of_their_own() -> None:
    shown = run("-m", "r1hpc.submit", "--help").stdout
    assert "--partition" not in shown
    assert "--help-slurm" in shown
    done = run("-m", "r1hpc.submit", "--help-slurm")
    assert done.returncode == 0
    assert {"-N", "--partition", "--sbatch"} <= set(done.stdout.replace(",", " ").split())


def test_usage_is_in_the_words_that_were_typed(tmp_path: Path) -> None:
    typed = tmp_path / "r1hpc"
    typed.write_text("from r1hpc.__main__ import main\nmain()\n")
    done = run(str(typed), "export-metrics", "--help")
    assert done.stdout.startswith("usage: r1hpc export-metrics [-h]")
    assert "python -m" not in done.stdout
    assert run(str(typed), "status", "--nope").stderr.endswith("(see r1hpc status --help)\n")
    assert run("-m", "r1hpc.status", "--help").stdout.startswith("usage: python -m r1hpc.status [-h]")


def test_the_public_names_complete() -> None:
    assert {"Run", "submit", "Chain"} <= set(dir(__import__("r1hpc")))


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    wrong = run("-m", "r1hpc", "sumbit")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'submit'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr
