"""Render the job script: job.sh for `submit`, and sbatch/train.sh, which makes its run as it starts.

Rewrite sbatch/train.sh with: python -m r1hpc.slurm.script > sbatch/train.sh. The text is in
r1hpc/slurm/script_text.py; both scripts source job.bash beside it, which does what Python cannot.

Ranks in a container are started by Apptainer or Singularity, or by Pyxis, a plugin of srun. Only the ranks
run in it. The begin and the end of an attempt call scontrol and sacct, which an image does not have: they run
on the host, with cluster.python or the submitting python.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.paths import files_in
from r1hpc.config.schema.cluster import ClusterConfig, ContainerConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.batch import ranks_per_node
from r1hpc.slurm import fields, script_text
from r1hpc.slurm.rank_env import expand_nodelist
from r1hpc.slurm.shell import contract

DEFAULT_SIGNAL_LEAD_S = 300
FUNCTIONS = Path(__file__).with_name("job.bash")
"""The shell functions that both scripts source, from the run's frozen code."""
_ASKED = (
    *("partition", "account", "qos", "cpus-per-task", "mem", "time", "constraint", "nodelist", "exclude"),
    *("reservation", "comment", "mail-type", "mail-user"),
)
"""Options of sbatch that are a setting of section `resources`; some have a default in section `cluster`."""
_MOST_EXCLUDED = 4
"""Nodes that could not begin a job before it gives up: then the nodes are not at fault."""


def _in_container(
    container: ContainerConfig, binds: Sequence[str], has_gpus: bool
) -> tuple[list[str], list[str]]:
    """Return the words before `-m r1hpc.launch rank`, and srun's options; the latter only for Pyxis."""
    if container.runtime == "pyxis":
        mounts = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
        step = [f"--container-image={container.image}", f"--container-mounts={mounts}", *container.options]
        return [container.python], step
    start = [container.runtime, "exec", *(["--nv"] if has_gpus else []), "--bind", ",".join(binds)]
    return [*start, *container.options, str(container.image), container.python], []


def binds_of(config: RunConfig, run_root: Path) -> list[str]:
    """Return the folders that a container needs: run root, data, models, question files; the profile's."""
    models = (config.model.path, config.model.tokenizer, config.rl.teacher)
    needed = [str(run_root), config.data.path, config.rl.replay, *models]
    for model in models:
        if model is not None and Path(model).is_dir():  # its files may be links, as in the Hub's cache
            links = (file for file in Path(model).iterdir() if file.is_symlink())
            needed += sorted({str(link.resolve().parent) for link in links})
    for path in (*files_in(config), *config.evaluate.trained_on):
        needed.append(path if Path(path).is_dir() else str(Path(path).parent))
    folders = [name for name in needed if name is not None and name.startswith("/")]
    return list(dict.fromkeys([*folders, *config.cluster.container.binds]))


@dataclass(frozen=True)
class Script:
    """All values in the text of a job script. The constructor checks every field."""

    run_dir: Path
    python: tuple[str, ...]
    """The words that start an interpreter on the host."""
    ranks_per_node: int
    options: Mapping[str, str]
    """sbatch long options in the order they are written; an empty value is a bare flag."""
    setup: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    num_excluded: int = 0
    """Number of nodes that the user has excluded."""
    rank: Sequence[str] = ()
    """The words that start a rank's interpreter in a container; empty: as on the host."""
    step: Sequence[str] = ()
    """More options of srun."""
    by_submitit: bool = True
    """Ranks are started through submitit; else by `r1hpc.launch rank` directly, as all are in a container."""
    contract: int = contract.CURRENT
    """The contract that the run's frozen code knows, see slurm/shell/contract.py."""

    def __post_init__(self) -> None:
        fields.check_path(self.run_dir, "the run folder")
        fields.check_path(Path(self.python[0]).absolute(), "the interpreter (cluster.python)")
        if self.ranks_per_node < 1:
            raise UsageError(f"{self.ranks_per_node} ranks per node: at least one is needed")

    def with_options(self, more: Mapping[str, str]) -> "Script":
        """Return the script with these sbatch options over its own."""
        return dataclasses.replace(self, options={**self.options, **more})


def make_script(run: RunDir, config: RunConfig) -> Script:
    """Return the script of a run. Raise UsageError if a field has a forbidden value, a node is both required
    and excluded, or the run's frozen code is newer than this one."""
    resources, cluster = config.resources, config.cluster
    gpus_per_node = resources.gpus_per_node or 0
    fields.check_resources(resources)
    fields.check_cluster(cluster)
    excluded = expand_nodelist(resources.exclude) if resources.exclude else ()
    required = expand_nodelist(resources.nodelist) if resources.nodelist else ()
    both = sorted(set(excluded).intersection(required))
    if both:
        raise UsageError(
            f"--nodelist asks for {', '.join(both)}, which --exclude forbids: this job never starts. "
            "Remove these nodes from one of the two"
        )
    ranks = ranks_per_node(config, gpus_per_node)
    rank: list[str] = []
    step = [f"--cpu-bind={cluster.cpu_bind}"] if cluster.cpu_bind else []
    if cluster.container.image is not None:
        binds = binds_of(config, run.path.parent)
        rank, more = _in_container(cluster.container, binds, gpus_per_node > 0)
        step += more
    gpus = f"{resources.gpu_type or ''}:{gpus_per_node}".lstrip(":")  # 4, or a100:4
    chosen: dict[str, str | int | None] = {
        "job-name": resources.job_name or run.run_id[:64],
        "nodes": resources.nodes,
        "ntasks-per-node": ranks,
        "gpus-per-node": gpus if gpus_per_node else None,
        "dependency": resources.dependency,
        **asked_options(config),
        "requeue": "",
        "signal": f"USR2@{resources.signal_lead_s or DEFAULT_SIGNAL_LEAD_S}",
        "chdir": str(run.path),
        "output": "/dev/null",
    }
    return Script(
        run_dir=run.path,
        python=interpreter(cluster),
        ranks_per_node=ranks,
        options={name: str(value) for name, value in chosen.items() if value is not None},
        setup=tuple(cluster.setup),
        environment=dict(cluster.environment),
        num_excluded=len(excluded),
        rank=rank,
        step=step,
        by_submitit=cluster.container.image is None,
        contract=contract.of_frozen(run.code) if run.code.is_dir() else contract.CURRENT,
    )


def interpreter(cluster: ClusterConfig) -> tuple[str, ...]:
    """Return the words that start python on the nodes' host system."""
    return tuple(cluster.python.split()) if cluster.python else (sys.executable,)


def asked_options(config: RunConfig) -> dict[str, str | int | None]:
    """Return the job's place and resources, by sbatch's names, from user or profile; None: not set."""
    options: dict[str, str | int | None] = {}
    for name in _ASKED:
        key = name.replace("-", "_")
        options[name] = getattr(config.resources, key) or getattr(config.cluster, key, None)
    exclusive = "" if config.resources.exclusive else None
    return {**options, "exclusive": exclusive, **config.resources.sbatch}


def render(script: Script) -> str:
    site = site_lines(script.setup, script.environment)
    loader = "r1hpc.slurm.payload" if script.contract >= 4 else "submitit.core._submit"
    by_submitit = _fill(script_text.BY_SUBMITIT, LOADER=loader)
    return _fill(
        script_text.RENDERED,
        DIRECTIVES=directives(script.options),
        SITE=site or "# (nothing)\n",
        RUN_DIR=shlex.quote(str(script.run_dir)),
        PYTHON=_words(script.python) if len(script.python) > 1 else shlex.quote(script.python[0]),
        RANK_LINES=_rank_lines(script) if script.rank or script.step or not script.by_submitit else "",
        RANKS_PER_NODE=str(script.ranks_per_node),
        CONTRACT=str(script.contract),
        SOURCE=_fill(script_text.SOURCE, MOST_EXCLUDED=str(_MOST_EXCLUDED + script.num_excluded)),
        ATTEMPT=_fill(
            script_text.ATTEMPT,
            BEGIN_FLAGS=" --payload" if script.by_submitit else "",
            SRUN_FLAGS=script_text.STEP if script.step else "",
            COMMAND=by_submitit if script.by_submitit else script_text.BY_LAUNCH,
        ),
    )


def train_script() -> str:
    """Return the text of sbatch/train.sh: the defaults of jobs/train.yaml, with any GPUs of the nodes."""
    options = {
        "job-name": "train",
        "nodes": "4",
        "exclusive": "",
        "mem": "0",
        "time": "1-00:00:00",
        "requeue": "",
        "open-mode": "append",
        "signal": f"USR2@{DEFAULT_SIGNAL_LEAD_S}",
        "output": "/dev/null",
    }
    return _fill(
        script_text.TRAIN,
        DIRECTIVES=directives(options),
        SOURCE=_fill(script_text.SOURCE, MOST_EXCLUDED=str(_MOST_EXCLUDED)),
        ATTEMPT=_fill(
            script_text.ATTEMPT,
            BEGIN_FLAGS="",
            SRUN_FLAGS=script_text.STEP + script_text.IMPLICIT_GPUS,
            COMMAND=script_text.BY_LAUNCH,
        ),
    )


def site_lines(setup: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the shell lines of a profile: its setup as written, its variables quoted."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "".join(f"{line}\n" for line in [*setup, *exports])


def _rank_lines(script: Script) -> str:
    """Return the arrays that both scripts give to srun to start ranks."""
    return f"RANK={_words(script.rank or script.python)}\nSTEP={_words(script.step)}\n"


def site_file(script: Script) -> str:
    """Return the file that sbatch/train.sh reads, once the run folder is made."""
    site = site_lines(script.setup, script.environment)
    return f"{site}{_rank_lines(script)}CONTRACT={script.contract}\n"


def _words(words: Sequence[str]) -> str:
    return f"({shlex.join(words)})"


def directives(options: Mapping[str, str]) -> str:
    """Return the lines that sbatch reads; an empty value is a bare flag."""
    return "\n".join(
        f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"
        for name, value in options.items()
    )


def _fill(template: str, **values: str) -> str:
    """Replace each @NAME@ once, in one pass: values are never read as placeholders."""
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], template)


if __name__ == "__main__":
    sys.stdout.write(train_script())
