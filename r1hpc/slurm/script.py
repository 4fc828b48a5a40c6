"""The job script: one template, two commands.

    render(script)       the text `python -m r1hpc.submit` hands to sbatch
    train_script()       sbatch/train.sh; rewrite it with: python -m r1hpc.slurm.script > sbatch/train.sh

Both end in the same lines, `_ATTEMPT`: begin, one srun task per rank, end. Pure text, no Slurm needed.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import RunDir
from r1hpc.config.schema import RunConfig
from r1hpc.slurm import fields

DEFAULT_SIGNAL_LEAD_S = 300

_RENDERED = """\
#!/bin/bash
@DIRECTIVES@
# Written by `python -m r1hpc.submit`; sbatch/train.sh is the same job without Python rendering.

trap : TERM USR2
umask 077

# -- the site, from the cluster profile --
@SITE@
# -- the run, frozen before submission --
RUN_DIR=@RUN_DIR@
PYTHON=@PYTHON@
RANKS_PER_NODE=@RANKS_PER_NODE@
@ATTEMPT@"""

_TRAIN = """\
#!/bin/bash
@DIRECTIVES@
# Train as a Slurm job:
#   sbatch [SBATCH OPTIONS] sbatch/train.sh [JOB.yaml] [KEY=VALUE ...] [--run-name NAME] [--run-root DIR]
#   sbatch --nodes=8 --gpus-per-node=8 sbatch/train.sh jobs/train.yaml train.lr=1e-4
# What sbatch is given for nodes, GPUs and time wins over the job file; the global batch size stays.
# The run folder is made on the first start, and found again after a preemption.
# Generated from the template in r1hpc/slurm/script.py, like every script `python -m r1hpc.submit` writes.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "train.sh is a Slurm job: start it with \\`sbatch sbatch/train.sh\\`." >&2
    echo "Without Slurm: \\`python -m r1hpc.submit --executor local jobs/smoke.yaml --follow\\`." >&2
    exit 2
fi

trap : TERM USR2
umask 077

# -- the site: your `module load` lines, or a profile in configs/cluster/ named by $R1HPC_CLUSTER --

# -- where the code and the interpreter are, on the first start --
CHECKOUT=${SLURM_SUBMIT_DIR:-$PWD}
[ -f "$CHECKOUT/r1hpc/submit.py" ] || CHECKOUT=$(dirname "$CHECKOUT")
for PYTHON in "${R1HPC_PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$CHECKOUT/.venv/bin/python"; do
    [ -x "$PYTHON" ] && break
done
[ -x "$PYTHON" ] || PYTHON=$(command -v python3) || { echo "no python: set R1HPC_PYTHON" >&2; exit 1; }

# -- the run folder, named after the job so that a requeued job finds it --
RUN_ROOT=${R1HPC_RUN_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}/runs}
RUN_NAME=${SLURM_JOB_NAME//[!A-Za-z0-9._-]/_}
RUN_NAME=${RUN_NAME:0:40}-$SLURM_JOB_ID
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case "${!i}" in
        --run-root=*) RUN_ROOT=${!i#*=} ;;
        --run-name=*) RUN_NAME=${!i#*=} ;;
        --run-root) RUN_ROOT=${!next:-} ;;
        --run-name) RUN_NAME=${!next:-} ;;
    esac
done
# A requeued job runs the code frozen on its first start, whatever has become of the checkout.
CODE=$CHECKOUT
[ -f "$RUN_ROOT/$RUN_NAME/config.yaml" ] && CODE=$RUN_ROOT/$RUN_NAME/code
[ -f "$CODE/r1hpc/submit.py" ] && export PYTHONSAFEPATH=1 PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}"
set -- "$@" --run-root "$RUN_ROOT" --run-name "$RUN_NAME"
PREPARED=$("$PYTHON" -m r1hpc.submit --prepare-only "$@") || exit
read -r RANKS_PER_NODE RUN_DIR <<< "$PREPARED"
. "$RUN_DIR/site.sh"
@ATTEMPT@"""

_ATTEMPT = """
# -- begin, one srun task per rank, end --
# The shell outlives the warning: a handler (an ignored signal would be inherited by the ranks) lets bash
# wait for srun to end, and then act. Started again after a preemption, it comes back to this line.
cd "$RUN_DIR" || exit 1
[ -e FINISHED ] && { echo "$RUN_DIR is finished: nothing to do"; exit 0; }
export PYTHONSAFEPATH=1 PYTHONPATH="$RUN_DIR/code${PYTHONPATH:+:$PYTHONPATH}"
@GUARD@# begin counts the ranks; an exclusive job's own number of tasks is not that of its ranks.
TASKS="$RANKS_PER_NODE(x$SLURM_JOB_NUM_NODES)"
ATTEMPT=$(SLURM_TASKS_PER_NODE=$TASKS "$PYTHON" -m r1hpc.launch begin "$RUN_DIR") || exit
[ -n "$ATTEMPT" ] || exit 0
export R1HPC_ATTEMPT=$ATTEMPT

CPUS=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))}
[ "$CPUS" -ge 1 ] || CPUS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
@EXPORTS@
# srun takes --cpus-per-task from nobody since Slurm 22.05. --wait: ranks that saved leave one by one while
# rank 0 commits; one that is left alone does not hold the nodes until the time limit.
srun --unbuffered --kill-on-bad-exit=1 --wait=600 --distribution=block \\
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \\
    --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS"@SRUN_FLAGS@ \\
    --output="$RUN_DIR/logs/attempt_$ATTEMPT/rank_%t.out" \\
    @COMMAND@ &
SRUN=$!
# In the background, so that TERM at the time limit is heard: whoever is still busy then is left behind, since
# Slurm does not start a job again that ran into its limit, and KILL follows. Any other TERM is the ranks'.
while true; do
    wait "$SRUN"
    STATUS=$?
    kill -0 "$SRUN" 2> /dev/null || break
    [ "$(date +%s)" -lt "$((${SLURM_JOB_END_TIME:-99999999999} - 5))" ] || { sleep 2; kill -KILL "$SRUN"; }
done

# No rank is left to inherit this: the last record is not cut short by the TERM of a requeue.
trap '' TERM USR2
"$PYTHON" -m r1hpc.launch end "$RUN_DIR" --attempt "$ATTEMPT" --status "$STATUS"
"""

_GUARD = """\
# submitit unpickles its payload: refused here unless it is a plain file that only you can write.
"$PYTHON" -m r1hpc.slurm.payload "$RUN_DIR" || exit
"""
_BY_SUBMITIT = '"$PYTHON" -u -m submitit.core._submit "$RUN_DIR/submitit"'
_BY_LAUNCH = '"$PYTHON" -u -m r1hpc.launch rank "$RUN_DIR"'
# A step is not given the GPUs that a job holds only because it is exclusive (srun(1), --gres).
_IMPLICIT_GPUS = ' ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"}'


@dataclass(frozen=True)
class Script:
    """All that the text of a job script depends on. Checked at birth, field by field."""

    run_dir: Path
    python: str
    ranks_per_node: int
    options: Mapping[str, str]
    """sbatch long options in the order they are written; an empty value is a bare flag."""
    setup: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    by_submitit: bool = True
    """Ranks are started through submitit; else by `r1hpc.launch rank` directly."""

    def __post_init__(self) -> None:
        fields.check_path(self.run_dir, "the run folder")
        fields.check_path(Path(self.python), "the interpreter (cluster.python)")
        if self.ranks_per_node < 1:
            raise UsageError(f"{self.ranks_per_node} ranks per node: at least one is needed")

    def with_options(self, more: Mapping[str, str]) -> "Script":
        """The script with these sbatch options over its own."""
        return dataclasses.replace(self, options={**self.options, **more})


def make_script(
    run: RunDir,
    config: RunConfig,
    *,
    gpus_per_node: int,
    signal_lead_s: int = DEFAULT_SIGNAL_LEAD_S,
) -> Script:
    """The script of a run, every field of it checked.

    Args:
        gpus_per_node: as resolved; 0 is a CPU run.
        signal_lead_s: USR2 comes this long before the time limit.

    Raises:
        UsageError: a field holds what it may not.
    """
    resources, cluster = config.resources, config.cluster
    fields.check_resources(resources)
    fields.check_cluster(cluster)
    ranks = ranks_per_node(config, gpus_per_node)
    chosen: dict[str, str | int | None] = {
        "job-name": resources.job_name or run.run_id[:64],
        "partition": resources.partition or cluster.partition,
        "account": resources.account or cluster.account,
        "qos": resources.qos or cluster.qos,
        "nodes": resources.nodes,
        "ntasks-per-node": ranks,
        "gpus-per-node": gpus_per_node or None,
        "cpus-per-task": resources.cpus_per_task or cluster.cpus_per_task,
        "mem": resources.mem or cluster.mem,
        "time": resources.time,
        "constraint": resources.constraint,
        "nodelist": resources.nodelist,
        "exclude": resources.exclude,
        "reservation": resources.reservation,
        "dependency": resources.dependency,
        "comment": resources.comment,
        "mail-type": resources.mail_type,
        "mail-user": resources.mail_user,
        "exclusive": "" if resources.exclusive else None,
        **resources.sbatch,
        "requeue": "",
        "open-mode": "append",
        "signal": f"USR2@{signal_lead_s}",
        "chdir": str(run.path),
        "output": str(run.logs / "slurm-%j.out"),
    }
    return Script(
        run_dir=run.path,
        python=cluster.python or sys.executable,
        ranks_per_node=ranks,
        options={name: str(value) for name, value in chosen.items() if value is not None},
        setup=tuple(cluster.setup),
        environment=dict(cluster.environment),
    )


def ranks_per_node(config: RunConfig, gpus_per_node: int) -> int:
    """One rank per GPU; a CPU run says how many itself."""
    return gpus_per_node or config.resources.ranks_per_node


def render(script: Script) -> str:
    """The whole job script."""
    site = site_lines(script.setup, script.environment)
    return _fill(
        _RENDERED,
        DIRECTIVES="\n".join(_directive(name, value) for name, value in script.options.items()),
        SITE=site or "# (nothing)\n",
        RUN_DIR=shlex.quote(str(script.run_dir)),
        PYTHON=shlex.quote(script.python),
        RANKS_PER_NODE=str(script.ranks_per_node),
        ATTEMPT=_fill(
            _ATTEMPT,
            GUARD=_GUARD if script.by_submitit else "",
            EXPORTS="export SUBMITIT_EXECUTOR=slurm\n" if script.by_submitit else "",
            SRUN_FLAGS="",
            COMMAND=_BY_SUBMITIT if script.by_submitit else _BY_LAUNCH,
        ),
    )


def train_script() -> str:
    """The text of sbatch/train.sh: the defaults of jobs/train.yaml, whatever GPUs the nodes have."""
    options = {
        "job-name": "train",
        "nodes": "4",
        "exclusive": "",
        "mem": "0",
        "time": "1-00:00:00",
        "requeue": "",
        "open-mode": "append",
        "signal": f"USR2@{DEFAULT_SIGNAL_LEAD_S}",
        "output": "slurm-%j.out",
    }
    return _fill(
        _TRAIN,
        DIRECTIVES="\n".join(_directive(name, value) for name, value in options.items()),
        ATTEMPT=_fill(_ATTEMPT, GUARD="", EXPORTS="", SRUN_FLAGS=_IMPLICIT_GPUS, COMMAND=_BY_LAUNCH),
    )


def site_lines(setup: Sequence[str], environment: Mapping[str, str]) -> str:
    """The shell lines of a profile: its setup as written, its variables quoted."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "".join(f"{line}\n" for line in [*setup, *exports])


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _fill(template: str, **values: str) -> str:
    """Replace each @NAME@ once, in one pass: what a value holds is never a placeholder."""
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], template)


if __name__ == "__main__":
    sys.stdout.write(train_script())
