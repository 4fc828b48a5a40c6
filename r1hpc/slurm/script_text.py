"""Hold the text of job.sh and sbatch/train.sh; r1hpc/slurm/script.py fills in its placeholders.

RENDERED, TRAIN  job.sh and sbatch/train.sh: who runs what, and where job.bash, the shell functions, lies
SOURCE           load these functions; what the script must do by itself, since the node may not see them
ATTEMPT          begin, one srun task per rank, end
"""

RENDERED = """\
#!/bin/bash
@DIRECTIVES@
# Written by `python -m r1hpc.submit`. Each start of the job is one attempt at the run.

# -- the run, frozen before submission --
RUN_DIR=@RUN_DIR@
PYTHON=@PYTHON@
@RANK_LINES@RANKS_PER_NODE=@RANKS_PER_NODE@
CONTRACT=@CONTRACT@ # what the frozen code knows, see r1hpc/slurm/shell/contract.py
load_functions() {
    cd "$RUN_DIR" && [ -r "code/$FUNCTIONS" ] || return
    only_ours . code code/.. "code/$FUNCTIONS" "$(foreign code/)" || exit 1 # a link in a sweep
    exec >> "logs/slurm-$SLURM_JOB_ID.out" 2>&1 # a disk that takes no log is for begin to tell
    . "code/$FUNCTIONS"
}
@SOURCE@
# -- the site, from the cluster profile --
@SITE@@ATTEMPT@"""

TRAIN = """\
#!/bin/bash
@DIRECTIVES@
# Train as a Slurm job:
#   sbatch [SBATCH OPTIONS] sbatch/train.sh [JOB.yaml] [KEY=VALUE ...] [--run-name NAME] [--run-root DIR]
#   sbatch --nodes=8 --gpus-per-node=8 sbatch/train.sh jobs/train.yaml train.lr=1e-4
# The nodes, GPUs and time given to sbatch win over the job file; the global batch size stays.
# The run folder is made on the first start, and found again after a preemption.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "train.sh is a Slurm job: start it with \\`sbatch sbatch/train.sh\\`." >&2
    echo "Without Slurm: \\`python -m r1hpc.submit --executor local jobs/smoke.yaml --follow\\`." >&2
    exit 2
fi

# -- the site: your `module load` lines and the interpreter, or a profile that R1HPC_CLUSTER names --
CLONE=${SLURM_SUBMIT_DIR%/sbatch} CLONE=${CLONE%/jobs}
site() {
    # module load cuda/12.4
    PYTHON=${R1HPC_PYTHON:-${VIRTUAL_ENV:-$CLONE/.venv}/bin/python}
    [ -x "$PYTHON" ] || PYTHON=$(command -v python3)
}

# -- the run, named after the job so that a requeued job finds its folder --
RUN_ROOT=${R1HPC_RUN_ROOT:-$SLURM_SUBMIT_DIR/runs}
RUN_NAME=${SLURM_JOB_NAME//[!A-Za-z0-9._-]/_}
RUN_NAME=${RUN_NAME:0:40}-$SLURM_JOB_ID
RUN_DIR='' before=''
for word in "$@"; do
    case "$before $word" in
        *" --") break ;; # the words of a script of yours follow
        "--run-root "* | *" --run-root="*) RUN_ROOT=${word#--run-root=} ;;
        "--run-name "* | *" --run-name="*) RUN_NAME=${word#--run-name=} ;;
    esac
    before=$word
done
load_functions() { # those of the run once it is made, else of the clone or of the installed package
    local run=$RUN_ROOT/$RUN_NAME
    cd "$SLURM_SUBMIT_DIR" || return
    [ ! /dev/stdout -ef /dev/null ] || exec >> "slurm-$SLURM_JOB_ID.out" 2>&1
    if grep -qs '}$' "$run/attempts.jsonl" && [ -r "$run/code/$FUNCTIONS" ]; then
        cd "$run" && only_ours . "code/$FUNCTIONS" "$(foreign code/)" || exit 1
        . "code/$FUNCTIONS" && cd "$SLURM_SUBMIT_DIR" || return
    elif [ -r "$CLONE/$FUNCTIONS" ]; then
        . "$CLONE/$FUNCTIONS"
    else
        site && . "$("$PYTHON" -c 'import r1hpc; print(*r1hpc.__path__)')/${FUNCTIONS#r1hpc/}"
    fi
}
@SOURCE@
patiently prepare "$@"
@ATTEMPT@"""

SOURCE = """\

# -- the shell functions, nothing to edit; a node that does not see them hands the job to another one --
FUNCTIONS=r1hpc/slurm/job.bash
PATIENCE="2 5 10 20 30 30 30" # seconds between tries
MOST_EXCLUDED=@MOST_EXCLUDED@               # nodes; if one more fails it is not the nodes
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
    find "$1" \\( ! -uid "$EUID" -o -perm /002 ! -type l \\) -print -quit | grep . || echo "$1"
}
leave_node() { # have the job start again on other nodes, unless somebody cancelled it
    local job=$SLURM_JOB_ID said nodes pause why=''
    trap '' TERM USR2
    [[ ! $RUN_DIR || ! -f $RUN_DIR/config.yaml ]] || why="$RUN_DIR lacks code/$FUNCTIONS, which it froze"
    for pause in 0 1 2 4 8 $(printf '15 %.0s' {1..39}); do # ten minutes
        sleep "$pause"
        said=$(scontrol show job -o "$SLURM_JOB_ID") || continue
        [[ ${said%% JobName=*} != *ArrayTaskId=* ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        [[ ${said#* UserId=} =~ \\ ExcNodeList=([^ ]*) ]]
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
    scontrol update JobId="$job" \\
        Comment="r1hpc: ${why:-$SLURMD_NODENAME does not see ${RUN_DIR:-$SLURM_SUBMIT_DIR}}"
    exit 1
}
for pause in $PATIENCE; do
    load_functions && break
    sleep "$pause" & wait $!
done
declare -F patiently > /dev/null || leave_node
"""

ATTEMPT = """
# -- an attempt: begin, one task per rank, end. Started again after a preemption, it comes back here --
patiently begin@BEGIN_FLAGS@
# Ranks that saved leave one by one while rank 0 commits; --wait ends one that is left alone.
srun --unbuffered --kill-on-bad-exit=1 --wait=600 --distribution=block \\
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \\
    --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS"@SRUN_FLAGS@ \\
    --output="$RUN_DIR/logs/attempt_$ATTEMPT/rank_%t.out" \\
    @COMMAND@ &
end $!
"""

BY_SUBMITIT = '"${PYTHON[@]}" -u -m @LOADER@ "$RUN_DIR/submitit"'
BY_LAUNCH = '"${RANK[@]}" -u -m r1hpc.launch rank "$RUN_DIR"'
STEP = ' "${STEP[@]}"'
# A step does not get GPUs that a job holds only because it is exclusive (srun(1), --gres).
IMPLICIT_GPUS = ' \\\n    ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"}'
