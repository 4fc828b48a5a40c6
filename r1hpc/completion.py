"""What TAB completes, for your shell: commands, flags, jobs, settings, runs.

    eval "$(r1hpc completion bash)"              # in ~/.bashrc; zsh likewise, in ~/.zshrc after compinit
    r1hpc completion fish | source               # in ~/.config/fish/config.fish

    r1hpc submit smo<TAB>                        # jobs by name, then KEY= of settings and their values
    python -m r1hpc.status <TAB>                 # runs under the run root; .venv/bin/python likewise

The lines name the `r1hpc` that printed them. In bash and zsh they also stand for python and python3: what
does not begin with `-m r1hpc` is completed by files in bash, in zsh as it was before.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.errors import R1hpcError

_PYTHONS = ("python", "python3")
# zsh completes nothing else of a command that has a function, so the function of before is called.
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
    """Print what the shell is to evaluate."""
    parser = ArgumentParser(prog="python -m r1hpc.completion", description=__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(list(argv)).shell
    from argcomplete.shell_integration import shellcode  # here, not above: --help must be quick

    names = ["r1hpc", *_PYTHONS] if shell == "bash" else ["r1hpc"]
    print(shellcode(names, shell=shell, argcomplete_script=str(_script())))
    if shell == "zsh":
        print(_ZSH_PYTHON)
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
