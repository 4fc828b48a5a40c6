"""Print shell code that completes commands, flags, jobs, settings and runs with TAB.

    eval "$(r1hpc completion bash)"              # in ~/.bashrc; zsh: in ~/.zshrc after compinit
    r1hpc completion fish | source               # in ~/.config/fish/config.fish

    r1hpc submit smo<TAB>                        # jobs by name, then KEY= of settings and their values
    python -m r1hpc.status <TAB>                 # runs under the run root; also .venv/bin/python

The lines name the `r1hpc` that printed them. In bash and zsh they also cover python and python3. Other python
commands complete files in bash, and as before in zsh.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError

_PYTHONS = ("python", "python3")
# zsh completes nothing else for a command with a function, so this calls the previous function.
_ZSH_PYTHON = (
    """
_r1hpc_python() {
    if [[ $words[2] == -m && -n $words[3] && ( $words[3] == r1hpc* || r1hpc == $words[3]* ) ]]; then
        eval "$_comps[r1hpc]"
    else
        eval "${_r1hpc_before[$words[1]:t]:-_default}"
    fi
}
typeset -gA _r1hpc_before
() {
    setopt localoptions extendedglob
    local name
    for name in """
    + " ".join(_PYTHONS)
    + """; do
        [[ $_comps[$name] == _r1hpc_python ]] && continue
        _r1hpc_before[$name]=${_comps[$name]:-${_postpatcomps[(K)$name]}}
        compdef _r1hpc_python $name
    done
}
"""
)


def main(argv: Sequence[str]) -> int:
    """Print the code for the shell to evaluate."""
    parser = ArgumentParser(prog="python -m r1hpc.completion", description=__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(list(argv)).shell
    from argcomplete.shell_integration import shellcode  # deferred to keep --help quick

    names = ["r1hpc", *_PYTHONS] if shell == "bash" else ["r1hpc"]
    print(shellcode(names, shell=shell, argcomplete_script=str(_script())))
    if shell == "zsh":
        print(_ZSH_PYTHON)
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
