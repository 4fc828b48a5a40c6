#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@300
#SBATCH --output=slurm-%j.out
# Train as a Slurm job:
#   sbatch [SBATCH OPTIONS] sbatch/train.sh [JOB.yaml] [KEY=VALUE ...] [--run-name NAME] [--run-root DIR]
#   sbatch --nodes=8 --gpus-per-node=8 sbatch/train.sh jobs/train.yaml train.lr=1e-4
# What sbatch is given for nodes, GPUs and time wins over the job file; the global batch size stays.
# The run folder is made on the first start, and found again after a preemption.
# Generated from the template in r1hpc/slurm/script.py, like every script `python -m r1hpc.submit` writes.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "train.sh is a Slurm job: start it with \`sbatch sbatch/train.sh\`." >&2
    echo "Without Slurm: \`python -m r1hpc.submit --executor local jobs/smoke.yaml --follow\`." >&2
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

# -- begin, one srun task per rank, end --
# The shell outlives the warning: a handler (an ignored signal would be inherited by the ranks) lets bash
# wait for srun to end, and then act. Started again after a preemption, it comes back to this line.
cd "$RUN_DIR" || exit 1
[ -e FINISHED ] && { echo "$RUN_DIR is finished: nothing to do"; exit 0; }
export PYTHONSAFEPATH=1 PYTHONPATH="$RUN_DIR/code${PYTHONPATH:+:$PYTHONPATH}"
# begin counts the ranks; an exclusive job's own number of tasks is not that of its ranks.
TASKS="$RANKS_PER_NODE(x$SLURM_JOB_NUM_NODES)"
ATTEMPT=$(SLURM_TASKS_PER_NODE=$TASKS "$PYTHON" -m r1hpc.launch begin "$RUN_DIR") || exit
[ -n "$ATTEMPT" ] || exit 0
export R1HPC_ATTEMPT=$ATTEMPT

CPUS=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))}
[ "$CPUS" -ge 1 ] || CPUS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}

# srun takes --cpus-per-task from nobody since Slurm 22.05. --wait: ranks that saved leave one by one while
# rank 0 commits; one that is left alone does not hold the nodes until the time limit.
srun --unbuffered --kill-on-bad-exit=1 --wait=600 --distribution=block \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \
    --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS" ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"} \
    --output="$RUN_DIR/logs/attempt_$ATTEMPT/rank_%t.out" \
    "$PYTHON" -u -m r1hpc.launch rank "$RUN_DIR" &
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
