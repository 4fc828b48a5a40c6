"""Print shell code that completes commands, flags, jobs, settings and runs with TAB.

    eval "$(r1hpc completion bash)"              # in ~/.bashrc; zsh: in ~/.zshrc after compinit
    r1hpc completion fish | source               # in ~/.config/fish/config.fish

    r1hpc submit smo<TAB>                        # jobs by name, then KEY= of settings and their values
    r1hpc status <TAB>                           # runs under the run root

The lines name the `r1hpc` that printed them.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError


def main(argv: Sequence[str]) -> int:
    """Print the code for the shell to evaluate."""
    parser = ArgumentParser(prog="python -m r1hpc.completion", description=__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(argv).shell
    from argcomplete.shell_integration import shellcode  # deferred to keep --help quick

    print(shellcode(["r1hpc"], shell=shell, argcomplete_script=str(_script())))
    return 0


def _script() -> Path:
    """Return the r1hpc command of this Python, else the one on PATH."""
    beside = Path(sys.executable).with_name("r1hpc")
    found = str(beside) if beside.is_file() else shutil.which("r1hpc")
    if found is None:
        raise R1hpcError(
            "there is no command r1hpc beside this Python: install the package (pip install -e .)"
        )
    return Path(found).absolute()


if __name__ == "__main__":
    run_command(main)
