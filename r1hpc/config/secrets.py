"""Keep secrets out of run folders and jobs, and choose the variables that a job gets (`exported`).

Secrets are found by a token's form or a value's name. One without a known form or name gets through. So the
environment is recorded (snapshot.py) and passed to a job by allow-list first; the search comes second.

sbatch alone would export all variables. slurmctld stores a job's environment, every process of the job can
read it, and it ends up in logs. A token a run needs belongs in the file its library reads (~/.netrc,
$HF_HOME/token), or in a `cluster.setup` line that reads such a file.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import printable

if TYPE_CHECKING:
    from r1hpc.config.schema.run import RunConfig

REDACTED = "[redacted]"
_NAME = r"(?:token|key|secret|passw(?:or)?d|pass_?phrase|pwd|cookie|credential|auth|bearer|private)"
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_.-]|\b){_NAME}s?(?:$|[_.-]|\b)|(?i:api_?key|access_?key)")

# Configuration keys and names in code; HF's own `eos_token` and `num_key_value_heads` are not secrets.
_SURE_NAME = (
    r"(?:(?:api|access|private)_?key|(?:auth|access|hf|api)_?token|secret|passw(?:or)?d|pass_?phrase|cookie|"
    r"credential)s?"
)
_SECRET_KEY = re.compile(rf"(?i)(^|[_.-]){_SURE_NAME}($|[_.-])|(^|\.)(token|auth|bearer|pwd)$")
_MAY_BE_SURE = tuple(
    re.compile(letters)
    for letters in (
        r"key(?:(?<=api_key)|(?<=(?:cess|vate)_key)|(?<=apikey)|(?<=(?:cess|vate)key))",
        r"token(?:(?<=(?:hf|pi)_token)|(?<=(?:auth|cess)_token)|(?<=apitoken)|(?<=(?:auth|cess)token))",
        *("passw", "phrase", "secret", "cookie", "credential"),
    )
)
"""A quick test of a lower-case text: one that matches none holds no such name. Nearly all files stop here."""
# Such a name with its value: quoted, and outside of code also unquoted; not a reference such as $VAR or
# <yours>.
_WRITTEN_OUT = re.compile(
    rf"(?im){_SURE_NAME}[\w-]*['\"]?[ \t]*[:=][ \t]*"
    r"(?:(?P<q>['\"])(?P<quoted>[^'\"\n${}<>%]{4,})(?P=q)|"
    r"(?P<plain>[^\s,;'\"(){}\[\]$<>%|`]{4,})[ \t]*(?:#.*)?$)"
)
_PASSWORD_IN_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^/\s@'\"]*:[^/\s@'\"]+@")
_USERINFO = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
# NAME = value, NAME: value, NAME=value; in code, YAML, shell and on command lines. Matches the full value.
_ASSIGNED = re.compile(
    rf"(?i)(?P<name>[A-Za-z0-9_.-]*{_NAME}s?[A-Za-z0-9_.-]*['\"]?\s*[:=]\s*)"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,;'\"(){}\[\]]+)"
)
# Values that reveal nothing, and calls, types and numbers, which code puts beside words such as `key`.
_PLAIN = re.compile(r"[\"']{0,2}(|\d+(\.\d+)?|None|null|true|false|True|False|str|int|bool|bytes)[\"']{0,2}")
_LEAST_VALUE = 6
_PASSED_NAMES = frozenset(
    """
    HOME PATH USER LOGNAME SHELL LANG LC_ALL LC_CTYPE TZ TERM TMPDIR SCRATCH WORK PROJECT
    LD_LIBRARY_PATH LIBRARY_PATH CPATH
    PYTHONPATH PYTHONNOUSERSITE PYTHONUSERBASE VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV
    LOADEDMODULES _LMFILES_ BASH_ENV BASH_FUNC_module%% BASH_FUNC_ml%% BASH_FUNC__module_raw%%
    HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE
    TOKENIZERS_PARALLELISM CC CXX MAX_JOBS DS_BUILD_OPS DS_SKIP_CUDA_CHECK TRITON_CACHE_DIR
    TORCHINDUCTOR_CACHE_DIR APPTAINER_BIND APPTAINER_BINDPATH APPTAINER_CACHEDIR
    SINGULARITY_BIND SINGULARITY_BINDPATH SINGULARITY_CACHEDIR
    XDG_CACHE_HOME XDG_CONFIG_HOME KRB5CCNAME SLURM_CONF SLURM_CLUSTERS
    WANDB_MODE WANDB_DIR WANDB_PROJECT WANDB_ENTITY WANDB_BASE_URL
    """.split()  # noqa: SIM905  # a list of 60 quoted words hides them
)
"""The allow-list: these variables and those with _PASSED_PREFIXES reach a job."""
_PROXIES = frozenset(("http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle"))
"""In upper or lower case."""
# Not DS_ACCELERATOR: the login node's device is not the job's, whose ranks choose by their own devices.
_PASSED_PREFIXES = (
    *("R1HPC_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "CUBLAS_", "CUDNN_", "MKL_", "UCX_", "FI_"),
    *("PYTORCH_", "TORCH_", "FLASH_ATTENTION_", "VLLM_"),
    *("LMOD_", "__LMOD_", "MODULE"),  # without them `module load` is not found in the job
)
# Slurm sets CUDA_VISIBLE_DEVICES; R1HPC_ATTEMPT and R1HPC_LOCAL_* describe the calling rank.
_NEVER_PASSED = ("CUDA_VISIBLE_DEVICES", "R1HPC_ATTEMPT", "R1HPC_LOCAL_", "R1HPC_CLIENT")


class Look(NamedTuple):
    """The form of one kind of token, as documented by its issuer."""

    letters: tuple[str, ...]
    """It contains one of these: searching for a literal is a hundred times faster than for a pattern."""
    pattern: re.Pattern[str]


LOOKS: dict[str, Look] = {
    "a Hugging Face token": Look(("hf_",), re.compile(r"hf_(?<=\bhf_)[A-Za-z0-9]{20,}")),
    "an API key": Look(("sk-",), re.compile(r"sk-(?<=\bsk-)[A-Za-z0-9_-]{12,}")),
    "an AWS access key": Look(("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}")),
    "a GitHub token": Look(
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{12,}|github_pat_[A-Za-z0-9_]{12,})"),
    ),
    "a GitLab token": Look(("glpat-",), re.compile(r"glpat-(?<=\bglpat-)[A-Za-z0-9_-]{12,}")),
    "a Google API key": Look(("AIza",), re.compile(r"AIza(?<=\bAIza)[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])")),
    "a Slack token": Look(("xox",), re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{8,}")),
    "a JSON web token": Look(
        ("eyJ",), re.compile(r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?")
    ),
    # Its body ends before the next five dashes, so that many beginnings are not read repeatedly.
    "a private key": Look(
        ("PRIVATE KEY",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-{1,4}(?!-)[^-]*)*(?:-----END [A-Z ]*-----)?"),
    ),
    "a line of a .netrc": Look(
        ("machine ",), re.compile(r"\bmachine[ \t]+\S+\s+(?:(?:login|account)\s+\S+\s+)*password\s+\S+")
    ),
}


def is_secret_name(name: str) -> bool:
    """True if a variable of this name probably holds a secret."""
    return _SECRET_NAME.search(name) is not None and name not in ("PWD", "OLDPWD")


def is_secret_key(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """Return the values of secretly named variables for `redact`, longest first, without short ones."""
    found = {value for name, value in environ.items() if is_secret_name(name) and len(value) >= _LEAST_VALUE}
    return sorted(found, key=len, reverse=True)


def find_secret(text: str, known: Iterable[str] = ()) -> str | None:
    """Return the kind of secret in `text`; None if there is none."""
    if any(value in text for value in known):
        return "the value of a secret variable of your environment"
    if "://" in text and any(_PASSWORD_IN_URL.search(line) for line in text.split("\n") if "://" in line):
        return "a URL with a password"
    likely = ((kind, look) for kind, look in LOOKS.items() if any(part in text for part in look.letters))
    return next((kind for kind, look in likely if look.pattern.search(text)), None)


def find_written_out(text: str, is_code: bool = False) -> str | None:
    """Return the text before the value given to a name such as `password`; None if there is none.

    In code only quoted text is a value; the rest are variables.
    """
    if not _may_name_a_secret(text):
        return None
    for line in text.split("\n"):  # a name and its value are on one line
        for found in _WRITTEN_OUT.finditer(line) if _may_name_a_secret(line) else ():
            value = found["quoted"] or ("" if is_code else found["plain"])
            if value and not _PLAIN.fullmatch(value):
                return found[0][: found[0].index(value)].rstrip("'\"").strip()
    return None


def _may_name_a_secret(text: str) -> bool:
    lowered = text.lower()
    return any(letters.search(lowered) for letters in _MAY_BE_SURE)


def redact(text: str, known: Iterable[str] = ()) -> str:
    """Return `text` with probable secrets replaced by [redacted]."""
    for value in known:
        text = text.replace(value, REDACTED)
    text = _USERINFO.sub(rf"\1{REDACTED}@", text)
    for look in LOOKS.values():
        text = look.pattern.sub(REDACTED, text)
    return _ASSIGNED.sub(
        lambda found: found[0] if _PLAIN.fullmatch(found["value"]) else f"{found['name']}{REDACTED}", text
    )


def refuse_secrets(config: "RunConfig", overrides: Sequence[str]) -> None:
    """Refuse a configuration with a secret in clear text; the ConfigError names the key, never the value."""
    known = secret_values(os.environ)
    for name, value in config.cluster.environment.items():
        if is_secret_name(name) or "@" in value.partition("://")[2]:
            raise ConfigError(
                f"cluster.environment.{printable(name)} would write a secret into the run folder: leave it "
                "in the file its library reads (~/.netrc, $HF_HOME/token), or read it in a cluster.setup line"
            )
    for item in overrides:
        key, _, value = item.partition("=")
        kind = find_secret(value, known)
        if kind:
            raise ConfigError(f"the value of {printable(key)} looks like {kind}: a run folder must hold none")
    for line in config.cluster.setup:
        if begun := find_written_out(line):
            raise ConfigError(
                f"a line of cluster.setup writes out a secret, {printable(begun)}…: read it from a file, "
                'as in export NAME="$(cat ~/.secrets/name)"'
            )
    _refuse_in(dataclasses.asdict(config), "", known)


def _refuse_in(value: Any, key: str, known: Sequence[str]) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_in(item, f"{key}.{name}" if key else str(name), known)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_in(item, key, known)
    elif isinstance(value, str | int) and value:
        kind = "a secret, by its name" if is_secret_key(key) else find_secret(str(value), known)
        if kind is not None:
            raise ConfigError(f"the value of {printable(key)} looks like {kind}: a run folder must hold none")


def exported(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for sbatch, and so for the job: nothing of SLURM_*, RANK or MASTER_*."""
    chosen = {
        name: value for name, value in environ.items() if _is_passed(name) and not _holds_a_login(name, value)
    }
    if "PYTHONPATH" in chosen:
        # A job starts in another folder, where "." or "src" differ.
        parts = chosen["PYTHONPATH"].split(os.pathsep)
        chosen["PYTHONPATH"] = os.pathsep.join(str(Path(part).absolute()) for part in parts)
    return chosen


def withheld(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that are withheld only because they hold a secret."""
    return sorted(name for name, value in environ.items() if _is_passed(name) and _holds_a_login(name, value))


def _is_passed(name: str) -> bool:
    allowed = name in _PASSED_NAMES or name.startswith(_PASSED_PREFIXES) or name.lower() in _PROXIES
    return allowed and not name.startswith(_NEVER_PASSED) and not is_secret_name(name)


def _holds_a_login(name: str, value: str) -> bool:
    """True if the value holds a token, or a URL with a user; a proxy's may lack the scheme."""
    url = value if name.lower() in _PROXIES else value.partition("://")[2]
    return "@" in url or find_secret(value) is not None
