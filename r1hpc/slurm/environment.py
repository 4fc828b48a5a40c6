"""Which of the caller's variables a job is given. sbatch alone would export all of them, secrets included.

The job's environment is stored by slurmctld, is readable by every process of the job, and ends up in logs;
so it is an allow-list. A token a run needs belongs in the file its library reads (~/.netrc,
$HF_HOME/token), or in a `cluster.setup` line that reads such a file.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from r1hpc.config.redact import find_secret, is_secret_name

_NAMES = frozenset(
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
_TO_THE_NETWORK = frozenset(("http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle"))
"""In either case."""
# Not DS_ACCELERATOR: the login node's device is not the job's, whose ranks choose by what they were given.
_PREFIXES = (
    *("R1HPC_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "CUBLAS_", "CUDNN_", "MKL_", "UCX_", "FI_"),
    *("PYTORCH_", "TORCH_", "FLASH_ATTENTION_", "VLLM_"),
    *("LMOD_", "__LMOD_", "MODULE"),  # or `module load` is not found in the job
)
# CUDA_VISIBLE_DEVICES is Slurm's to set; R1HPC_ATTEMPT and R1HPC_LOCAL_* describe the rank that calls us.
_NEVER = ("CUDA_VISIBLE_DEVICES", "R1HPC_ATTEMPT", "R1HPC_LOCAL_")
_FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "R1HPC_LOCAL_", "OMPI_", "PMI_", "PMIX_")
_FOREIGN_NAMES = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "R1HPC_ATTEMPT")
)


def exported(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment sbatch is run with, and so the job's: nothing of SLURM_*, RANK or MASTER_*."""
    source = os.environ if environ is None else environ
    chosen = {name: value for name, value in source.items() if _wanted(name) and not _is_login(name, value)}
    if "PYTHONPATH" in chosen:
        chosen["PYTHONPATH"] = _absolute(chosen["PYTHONPATH"])
    return chosen


def withheld(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that a job would be given if they held no secret."""
    return sorted(name for name, value in environ.items() if _wanted(name) and _is_login(name, value))


def without_foreign_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what describes a rank or a job: for a local run started from inside one."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _FOREIGN_NAMES and not (name.startswith(_FOREIGN) and name != "SLURM_CONF")
    }


def _wanted(name: str) -> bool:
    allowed = name in _NAMES or name.startswith(_PREFIXES) or name.lower() in _TO_THE_NETWORK
    return allowed and not name.startswith(_NEVER) and not is_secret_name(name)


def _is_login(name: str, value: str) -> bool:
    """True if the value holds a token, or a URL with a user; a proxy's may lack the scheme."""
    url = value if name.lower() in _TO_THE_NETWORK else value.partition("://")[2]
    return "@" in url or find_secret(value) is not None


def _absolute(search_path: str) -> str:
    """A job starts in another folder, where "." or "src" would be something else."""
    return os.pathsep.join(str(Path(part).absolute()) for part in search_path.split(os.pathsep))
