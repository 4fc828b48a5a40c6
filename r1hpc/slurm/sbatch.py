"""Submit a job script with sbatch exactly once: if the answer is lost, the job is found, not submitted again.

In squeue only a job's start folder can mark a submission. Every job of a run starts in the run's folder: one
that was not there before sbatch was called is the new one.

A refusal gets a line with the valid choices, which sbatch does not show. The texts are those of
slurm_errno.c, Slurm 20.11 to 24.11. Slurm gets a few seconds; without an answer its refusal is shown alone.

Only an allow-list of the caller's variables reaches a job; sbatch alone would export all of them, secrets
included. slurmctld stores the job's environment, every process of the job can read it, and it ends up in
logs. A token a run needs belongs in the file its library reads (~/.netrc, $HF_HOME/token), or in a
`cluster.setup` line that reads such a file.
"""

import os
import pwd
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import StateError
from r1hpc.config.redact import find_secret, is_secret_name
from r1hpc.slurm.client import NO_CONFIGURATION, SlurmError, call, retry, run, without_advice
from r1hpc.slurm.queue import jobs_by_folder

_REFUSAL_TIMEOUT_S = 10.0
_MOST = 12
_OF_THE_MOMENT = (
    "node configuration is not available",
    "partition configuration not available now",
    "requested nodes are busy",
    "required node not available",
)
"""A test's errors while nodes are down, drained or reserved: a submitted job waits for them."""
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
"""In upper or lower case."""
# Not DS_ACCELERATOR: the login node's device is not the job's, whose ranks choose by their own devices.
_PREFIXES = (
    *("R1HPC_", "OMP_", "NCCL_", "GLOO_", "CUDA_", "CUBLAS_", "CUDNN_", "MKL_", "UCX_", "FI_"),
    *("PYTORCH_", "TORCH_", "FLASH_ATTENTION_", "VLLM_"),
    *("LMOD_", "__LMOD_", "MODULE"),  # without them `module load` is not found in the job
)
# Slurm sets CUDA_VISIBLE_DEVICES; R1HPC_ATTEMPT and R1HPC_LOCAL_* describe the calling rank.
_NEVER = ("CUDA_VISIBLE_DEVICES", "R1HPC_ATTEMPT", "R1HPC_LOCAL_", "R1HPC_CLIENT")
_FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "R1HPC_LOCAL_", "OMPI_", "PMI_", "PMIX_")
_FOREIGN_NAMES = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "R1HPC_ATTEMPT")
)
PATIENCE_S = 600.0
"""Seconds Slurm may be silent before a submission, and after one whose answer was lost."""
_TIMEOUT_S = 120.0
_TRIAL_S = 15.0
_LOOKS, _PAUSE_S = 5, 3.0
"""A request that waited for a frozen controller is served soon after its return."""


def with_choices(error: SlurmError) -> SlurmError:
    """Add a line with the valid choices to sbatch's refusal, if Slurm can list them."""
    for words, ask in _CHOICES.items():
        if words.casefold() in error.stderr.casefold():
            try:
                choices = ask()
            except SlurmError:
                return error
            message = f"{error}\n  {choices}"
            return SlurmError(message, error.exit_code, error.stdout, error.stderr, error.timed_out)
    return error


def _associations(column: str) -> set[str]:
    user = pwd.getpwuid(os.getuid()).pw_name
    question = ["sacctmgr", "-n", "-P", "show", "associations", f"user={user}", f"format={column}"]
    return set(call(question, _REFUSAL_TIMEOUT_S).split())


def _partitions() -> str:
    """Return the partitions with a node's resources; GPUs in Slurm's notation."""
    lines = call(["sinfo", "-h", "-o", "%R|%D|%c|%m|%G|%l"], _REFUSAL_TIMEOUT_S).split()
    shown = [
        f"{name}: {nodes} nodes of {cpus} CPUs, {memory} MB, {gres}, up to {limit}".replace(", (null)", "")
        for name, nodes, cpus, memory, gres, limit in (line.split("|") for line in lines)
    ]
    return "\n  ".join(["partitions here (-p PARTITION):", *shown[:_MOST]])


def _accounts() -> str:
    return _listed("your accounts", _associations("account"), "-A ACCOUNT")


def _qos() -> str:
    names = {name for line in _associations("qos") for name in line.split(",")}
    return _listed("your QOS", names, "--qos QOS")


def _features() -> str:
    lines = call(["sinfo", "-h", "-o", "%f"], _REFUSAL_TIMEOUT_S).split()
    names = {name for line in lines for name in line.split(",")} - {"(null)"}
    return _listed("features of the nodes here", names, "-C FEATURE")


def _listed(what: str, names: set[str], flag: str) -> str:
    if not names:
        return f"{what}: none that Slurm shows"
    shown = ", ".join(sorted(names)[:_MOST]) + (", ..." if len(names) > _MOST else "")
    return f"{what}: {shown} ({flag})"


_CHOICES: dict[str, Callable[[], str]] = {
    "invalid account": _accounts,
    "invalid qos": _qos,
    "invalid partition": _partitions,
    "node count specification invalid": _partitions,
    "more processors requested than permitted": _partitions,
    "node configuration is not available": _partitions,
    "requested time limit is invalid": _partitions,
    "invalid feature": _features,
}


def exported(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for sbatch, and so for the job: nothing of SLURM_*, RANK or MASTER_*."""
    source = os.environ if environ is None else environ
    chosen = {name: value for name, value in source.items() if _wanted(name) and not _is_login(name, value)}
    if "PYTHONPATH" in chosen:
        # A job starts in another folder, where "." or "src" differ.
        parts = chosen["PYTHONPATH"].split(os.pathsep)
        chosen["PYTHONPATH"] = os.pathsep.join(str(Path(part).absolute()) for part in parts)
    return chosen


def withheld(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that are withheld only because they hold a secret."""
    return sorted(name for name, value in environ.items() if _wanted(name) and _is_login(name, value))


def without_foreign_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without a rank's or job's variables: for a local run started inside one."""
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


class LostSubmissionError(SlurmError):
    """sbatch may have made a job, and Slurm does not say; or it has, and its job ID could not be saved."""


def sbatch(
    script: Path, folder: Path, options: Sequence[str] = (), known: Collection[str] | None = None
) -> str:
    """Submit a script whose job starts in `folder`; return the job's id.

    Raise SlurmError if sbatch refused or was not reached: there is no job. Raise LostSubmissionError if there
    may be a job. Raise StateError if the queue has a job of this folder that is not recorded.

    Args:
        known: the folder's recorded jobs; another one that waits or runs is refused. None: any may.
    """
    # A silent Slurm is asked again: nothing is submitted yet.
    jobs = retry(lambda: jobs_by_folder(all_states=True), lambda error: not error.unreachable, PATIENCE_S)
    before = set(jobs.get(folder, ()))
    if known is not None and before - set(known):
        unknown = [job for job in jobs_by_folder().get(folder, ()) if job not in known]  # not ended
        if unknown:
            raise StateError(
                f"job {unknown[-1]} of {folder.name} is in the queue, and its submission was cut off before "
                f"it was written down: scancel {unknown[-1]}, then submit again"
            )
    try:
        return read_job_id(call(["sbatch", "--parsable", *options, str(script)], _TIMEOUT_S, exported()))
    except SlurmError as error:
        if not error.may_have_arrived:
            raise with_choices(error) from None
        lost: SlurmError | StateError = error
    except StateError as error:
        lost = error
    found = _find_again(folder, before, lost)
    if found is None:
        raise lost
    print(f"the job is there: {found}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Trial:
    """Slurm's answer about a job that is not submitted."""

    sentence: str
    starts: bool = False
    """True if it gives the time and nodes of the start."""
    was_heard: bool = True


def try_out(text: str) -> Trial:
    """Show a script to Slurm without making a job; raise SlurmError if it would refuse the job."""
    try:
        answer = run(["sbatch", "--test-only"], _TRIAL_S, exported(), text=text).stderr
    except SlurmError as error:
        if error.unreachable or NO_CONFIGURATION in error.stderr:
            why = without_advice(error)
            return Trial(f"Slurm was not asked whether it would take this: {why}", was_heard=False)
        if not any(words in error.stderr.casefold() for words in _OF_THE_MOMENT):
            raise with_choices(error) from None
        said = " ".join(error.stderr.split())
        return Trial(f"Slurm refuses this, unless that is for nodes that are down at the moment: {said}")
    found = re.search(r"to start at (\S+) .*\bon nodes? (\S+)", answer)
    if found:
        return Trial(f"as its queue stands, Slurm would start this at {found[1]} on {found[2]}", starts=True)
    return Trial(" ".join(answer.split()) or "Slurm would take this")


def read_job_id(answer: str) -> str:
    """Return the id in the output of `sbatch --parsable`: ID or ID;CLUSTER, after output of a site's filter.
    Raise StateError if there is none."""
    found = re.fullmatch(r"(\d+)(;\S+)?", (answer.strip().splitlines() or [""])[-1])
    if not found:
        raise StateError(
            f"sbatch answered {answer.strip()!r} instead of a job id; look for the job with squeue"
        )
    return found[1]


def _find_again(folder: Path, before: set[str], lost: SlurmError | StateError) -> str | None:
    """Return the job of an unanswered submission; None if Slurm answers again and there is none."""
    reason = " ".join(str(lost).split())
    print(f"{reason}: checking whether the job exists all the same", file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE_S
    looks = 0
    while looks < _LOOKS:
        try:
            new = set(jobs_by_folder(all_states=True).get(folder, ())) - before
        except SlurmError as error:
            if time.monotonic() > deadline:
                raise LostSubmissionError(
                    f"{lost}\nSlurm has been silent for {PATIENCE_S:.0f} s since, so there may be a job of it"
                    ": look with squeue"
                ) from error
        else:
            if new:
                return min(new, key=int)  # for an array its own id, not a task's
            looks += 1
        time.sleep(_PAUSE_S)
    return None
