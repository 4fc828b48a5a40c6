"""What TAB completes, for your shell: commands, flags, jobs, settings, runs.

    eval "$(r1hpc completion bash)"              # in ~/.bashrc; zsh likewise, in ~/.zshrc after compinit
    r1hpc completion fish | source               # in ~/.config/fish/config.fish

    r1hpc submit smo<TAB>                        # jobs by name, then KEY= of settings and their values
    python -m r1hpc.status <TAB>                 # runs under the run root; .venv/bin/python likewise

The lines name the `r1hpc` that printed them. In bash and zsh they also stand for python and python3, where
all that does not begin with `-m r1hpc` is completed by files.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError

_PYTHONS = ("python", "python3")


def main(argv: Sequence[str]) -> int:
    """Print what the shell is to evaluate."""
    parser = ArgumentParser(prog="python -m r1hpc.completion", description=__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(list(argv)).shell
    from argcomplete.shell_integration import shellcode  # here, not above: --help must be quick

    names = ["r1hpc"] if shell == "fish" else ["r1hpc", *_PYTHONS]
    print(shellcode(names, shell=shell, argcomplete_script=str(_script())))
    return 0


def _script() -> Path:
    """The r1hpc that belongs to this Python: it answers for all of them."""
    beside = Path(sys.executable).with_name("r1hpc")
    found = str(beside) if beside.is_file() else shutil.which("r1hpc")
    if found is None:
        raise R1hpcError(
            "there is no command r1hpc beside this Python: install the package (pip install -e .)"
        )
    return Path(found).absolute()


if __name__ == "__main__":
    run_command(main)
