#!/bin/bash
#SBATCH --job-name=train-1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --account=my-group
#SBATCH --qos=scavenger
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --comment='a b'
#SBATCH --exclusive
#SBATCH --wckey=x
#SBATCH --requeue
#SBATCH --signal=USR2@240
#SBATCH --chdir=/scratch/runs/train-1
#SBATCH --output=/dev/null
# Written by `python -m r1hpc.submit`. Each start of the job is one attempt at the run.

# -- the run, frozen before submission --
RUN_DIR=/scratch/runs/train-1
PYTHON=/opt/venv/bin/python
RANKS_PER_NODE=8
CONTRACT=5 # what the frozen code knows, see r1hpc/slurm/shell/contract.py
load_functions() {
    cd "$RUN_DIR" && [ -r "code/$FUNCTIONS" ] || return
    only_ours . code code/.. "code/$FUNCTIONS" "$(foreign code/)" || exit 1 # a link in a sweep
    exec >> "logs/slurm-$SLURM_JOB_ID.out" 2>&1 # a disk that takes no log is for begin to tell
    . "code/$FUNCTIONS"
}

# -- the shell functions, nothing to edit; a node that does not see them hands the job to another one --
FUNCTIONS=r1hpc/slurm/job.bash
PATIENCE="2 5 10 20 30 30 30" # seconds between tries
MOST_EXCLUDED=4               # nodes; if one more fails it is not the nodes
trap : TERM USR2              # this shell outlives both; the ranks would inherit an ignored signal
umask 077
only_ours() { # you own these folders and files, and only you may write them: they run as you
    [ "$(find -L "$@" -maxdepth 0 -uid "$EUID" ! -perm /022 | wc -l)" = $# ] && return
    set -- "the run folder ${RUN_DIR:-$RUN_ROOT/$RUN_NAME} is another user's, or others may write it: not run"
    echo "$1"
    scontrol update JobId="$SLURM_JOB_ID" Comment="$1" # the log may lie in that folder
    return 3
}
foreign() { # the first file below a folder that another user owns or may write; else the folder
    find "$1" \( ! -uid "$EUID" -o -perm /002 ! -type l \) -print -quit | grep . || echo "$1"
}
leave_node() { # have the job start again on other nodes, unless somebody cancelled it
    local job=$SLURM_JOB_ID said nodes pause why=''
    trap '' TERM USR2
    [[ ! $RUN_DIR || ! -f $RUN_DIR/config.yaml ]] || why="$RUN_DIR lacks code/$FUNCTIONS, which it froze"
    for pause in 0 1 2 4 8 $(printf '15 %.0s' {1..39}); do # ten minutes
        sleep "$pause"
        said=$(scontrol show job -o "$SLURM_JOB_ID") || continue
        [[ ${said%% JobName=*} != *ArrayTaskId=* ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        [[ ${said#* UserId=} =~ \ ExcNodeList=([^ ]*) ]]
        nodes=${BASH_REMATCH[1]/#(null)/} nodes=${nodes:+$nodes,}$SLURMD_NODENAME
        [ "$(scontrol show hostnames "$nodes" | wc -l)" -le "$MOST_EXCLUDED" ] || break
        # Without a node that it asks for by name the job could never start: then it is held.
        [[ ! $why && $said == *" ReqNodeList=(null) "* ]] || nodes=''
        if said+=$(scontrol requeue Incomplete "$job" 2>&1); then
            [ -n "$nodes" ] && scontrol update JobId="$job" ExcNodeList="$nodes" && exit 1
            scontrol hold "$job"
            break
        elif [[ $said == *"presently disabled"* ]]; then
            [[ $nodes && $RUN_DIR ]] || break # train.sh has arguments
            [[ ${said#* UserId=} == *" JobState=RUNNING "* ]] || continue # else cancelled
            (unset SLURM_RESTART_COUNT SLURM_JOB_{START,END}_TIME SLURM_ARRAY_{JOB,TASK}_ID
                sbatch --dependency=afterany:"$job" --exclude="$nodes" "$0") && exit 1
        fi
    done
    scontrol update JobId="$job" \
        Comment="r1hpc: ${why:-$SLURMD_NODENAME does not see ${RUN_DIR:-$SLURM_SUBMIT_DIR}}"
    exit 1
}
for pause in $PATIENCE; do
    load_functions && break
    sleep "$pause" & wait $!
done
declare -F patiently > /dev/null || leave_node

# -- the site, from the cluster profile --
module load cuda/12.4
export NCCL_IB_HCA=mlx5_0,mlx5_1

# -- an attempt: begin, one task per rank, end. Started again after a preemption, it comes back here --
patiently begin --payload
# Ranks that saved leave one by one while rank 0 commits; --wait ends one that is left alone.
srun --unbuffered --kill-on-bad-exit=1 --wait=600 --distribution=block \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \
    --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS" \
    --output="$RUN_DIR/logs/attempt_$ATTEMPT/rank_%t.out" \
    "${PYTHON[@]}" -u -m r1hpc.slurm.payload "$RUN_DIR/submitit" &
end $!
