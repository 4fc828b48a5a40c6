#!/bin/bash
#SBATCH --job-name=train-1
#SBATCH --partition=gpu
#SBATCH --account=my-group
#SBATCH --qos=scavenger
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --comment='a b'
#SBATCH --exclusive
#SBATCH --wckey=x
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@240
#SBATCH --chdir=/scratch/runs/train-1
#SBATCH --output=/scratch/runs/train-1/logs/slurm-%j.out
# Written by `python -m r1hpc.submit`; sbatch/train.sh is the same job without Python rendering.

trap : TERM USR2
umask 077

# -- the site, from the cluster profile --
module load cuda/12.4
export NCCL_IB_HCA=mlx5_0,mlx5_1

# -- the run, frozen before submission --
RUN_DIR=/scratch/runs/train-1
PYTHON=/opt/venv/bin/python
RANKS_PER_NODE=8

# -- begin, one srun task per rank, end --
# The shell outlives the warning: a handler (an ignored signal would be inherited by the ranks) lets bash
# wait for srun to end, and then act. Started again after a preemption, it comes back to this line.
cd "$RUN_DIR" || exit 1
[ -e FINISHED ] && { echo "$RUN_DIR is finished: nothing to do"; exit 0; }
export PYTHONSAFEPATH=1 PYTHONPATH="$RUN_DIR/code${PYTHONPATH:+:$PYTHONPATH}"
# submitit unpickles its payload: refused here unless it is a plain file that only you can write.
"$PYTHON" -m r1hpc.slurm.payload "$RUN_DIR" || exit
# begin counts the ranks; an exclusive job's own number of tasks is not that of its ranks.
TASKS="$RANKS_PER_NODE(x$SLURM_JOB_NUM_NODES)"
ATTEMPT=$(SLURM_TASKS_PER_NODE=$TASKS "$PYTHON" -m r1hpc.launch begin "$RUN_DIR") || exit
[ -n "$ATTEMPT" ] || exit 0
export R1HPC_ATTEMPT=$ATTEMPT

CPUS=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))}
[ "$CPUS" -ge 1 ] || CPUS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
export SUBMITIT_EXECUTOR=slurm

# srun takes --cpus-per-task from nobody since Slurm 22.05. --wait: ranks that saved leave one by one while
# rank 0 commits; one that is left alone does not hold the nodes until the time limit.
srun --unbuffered --kill-on-bad-exit=1 --wait=600 --distribution=block \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \
    --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS" \
    --output="$RUN_DIR/logs/attempt_$ATTEMPT/rank_%t.out" \
    "$PYTHON" -u -m submitit.core._submit "$RUN_DIR/submitit" &
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
