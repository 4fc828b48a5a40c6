#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@300
#SBATCH --output=/dev/null
# Train as a Slurm job:
#   sbatch [SBATCH OPTIONS] sbatch/train.sh [JOB.yaml] [KEY=VALUE ...] [--run-name NAME] [--run-root DIR]
#   sbatch --nodes=8 --gpus-per-node=8 sbatch/train.sh jobs/train.yaml train.lr=1e-4
# What sbatch is given for nodes, GPUs and time wins over the job file; the global batch size stays.
# The run folder is made on the first start, and found again after a preemption.
# Generated from the template in r1hpc/slurm/script_text.py, as is what `r1hpc.submit` writes.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "train.sh is a Slurm job: start it with \`sbatch sbatch/train.sh\`." >&2
    echo "Without Slurm: \`python -m r1hpc.submit --executor local jobs/smoke.yaml --follow\`." >&2
    exit 2
fi

trap : TERM USR2
umask 077
RUN_DIR= WHOLE= # not those that sbatch has brought along from its caller's environment
# Nor what an interactive step, in which sbatch was called, had been given: srun would take it for options.
unset SLURM_CPU_BIND SLURM_CPU_BIND_{TYPE,LIST,VERBOSE} SLURM_MEM_BIND SLURM_MEM_BIND_{TYPE,LIST,VERBOSE} \
    SLURM_MEM_PER_{CPU,GPU,NODE} SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
# One that sbatch has brought along is set to 1, though nobody asked for it and the job may have whole nodes.
[ "${SLURM_CPUS_PER_TASK:-}" != 1 ] || unset SLURM_CPUS_PER_TASK

# -- what this shell does where Python cannot --
# sbatch brings along the environment of its caller, which may be another job, of an array or started again.
if [ -n "${SLURM_ARRAY_TASK_ID:-}${SLURM_RESTART_COUNT:-}" ]; then
    SAID=$(scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null)
    if [ -n "$SAID" ] && [[ ${SAID%% JobName=*} != *ArrayTaskId=* ]]; then
        unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
        [[ ${SAID#* UserId=} =~ \ Restarts=([0-9]+) ]] && export SLURM_RESTART_COUNT=${BASH_REMATCH[1]}
    fi
fi
JOB=$SLURM_JOB_ID # of an array's task that may be the whole array's
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# Slurm 23.02 and newer tell a job when its time limit ends.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    TIMES=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$JOB" --format='%S %e' 2> /dev/null)
    read -r BEGAN ENDS <<< "$TIMES"
    [ -z "$BEGAN" ] || export SLURM_JOB_START_TIME=$(date -d "$BEGAN" +%s 2> /dev/null)
    [ -z "$ENDS" ] || export SLURM_JOB_END_TIME=$(date -d "$ENDS" +%s 2> /dev/null)
fi

# Status 3, which is final, unless you own the run folder $1 and only you may write it: its code runs as you.
only_ours() {
    local said="the run folder ${RUN_DIR:-$1} is another user's, or others may write it: not run"
    [ -O "$1" ] && [ -n "$(find -L "$1" -maxdepth 0 ! -perm /022)" ] && return
    echo "$said"
    scontrol update JobId="$JOB" Comment="$said" # the log may lie in that folder
    return 3
}

# Why Slurm ends the job: cancel, grace, limit, requeue; nothing where it does not, or does not answer. All of
# them are shown as COMPLETING. The end of a grace time moves PreemptTime to the end of the job. over: Slurm
# has lost a node, and takes the job for ended. elsewhere: it has started the job again on other nodes.
why_ending() {
    local said ends=' JobState=(COMPLETING|CANCELLED|PREEMPTED|PENDING) '
    said=$(scontrol show job -o "$JOB" 2> /dev/null)
    said=${said#* UserId=}
    if [[ $said =~ \ JobState=(NODE_FAIL|BOOT_FAIL|TIMEOUT|DEADLINE|FAILED|OUT_OF_MEMORY)\  ]]; then
        echo over
    elif [[ $said =~ \ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0})); then
        [[ $said =~ $ends ]] && echo requeue || echo elsewhere
    elif [[ ! $said =~ $ends ]]; then
        return
    elif [[ $said =~ \ Reason=NodeDown\  ]]; then
        echo over
    elif [[ $said =~ \ EndTime=([^ ]+)\ .*\ PreemptTime=([^ ]+) ]] &&
        [ "${BASH_REMATCH[1]}" = "${BASH_REMATCH[2]}" ]; then
        echo grace
    elif at_limit "$said"; then
        echo limit
    else
        echo cancel
    fi
}
# Only of a job that has ended: then both are by the clock of slurmctld. Of a running one scontrol and squeue
# count by the clock of this host.
at_limit() {
    [[ $1 =~ \ RunTime=([0-9:-]+)\ TimeLimit=([0-9:-]+)\  ]] || return
    local run=${BASH_REMATCH[1]} limit=${BASH_REMATCH[2]} # [D-]HH:MM:SS, so the longer text is more
    ((${#run} > ${#limit})) || { ((${#run} == ${#limit})) && [[ ! $run < $limit ]]; }
}

# Have the job run again, without the nodes $1 if any, and held where a reason $2 is given: asked for ten
# minutes, unless somebody cancelled it.
run_again() {
    local said pause script=$RUN_DIR/job.sh
    trap '' TERM USR2
    [ -r "$script" ] || script=$WHOLE
    for pause in 1 2 4 8 $(printf '15 %.0s' {1..39}); do
        case $(why_ending) in
            cancel) echo "job $JOB was cancelled: not run again"; exit 1 ;;
            elsewhere) echo "job $JOB was started again on other nodes: leaving it alone"; exit 1 ;;
            requeue) break ;;
            # Not a job that is cancelled in this very moment: it says nothing then.
            "") said=$(scontrol requeue Incomplete "$JOB" 2>&1) && [ "$(why_ending)" = requeue ] && break ;;
            *) said=$(scontrol requeue "$JOB" 2>&1) && break ;;
        esac
        case ${said,,} in
            *"pending execution"*) break ;;
            *"not found"*) exit 1 ;;
            *"presently disabled"* | *"invalid job id"* | *"already completing or completed"*)
                [ -n "$script" ] || { echo "$said: submit it again yourself, as you did"; exit 1; }
                said=$(env -u R1HPC_ATTEMPT -u SLURM_RESTART_COUNT -u SLURM_JOB_END_TIME \
                    -u SLURM_JOB_START_TIME -u SLURM_ARRAY_JOB_ID -u SLURM_ARRAY_TASK_ID sbatch --parsable \
                    --dependency="afterany:$JOB" ${1:+--exclude="$1"} ${2:+--hold --comment="r1hpc: $2"} \
                    "$script" 2>&1) && exit 1 ;;
        esac
        echo "${said:-job $JOB ended just before it could be requeued}: asking again in $pause s"
        sleep "$pause"
    done
    # It starts again once this script has ended. Without the exclusion it might come back here for ever.
    # Not for long: the requeue ends this script once KillWait is over.
    for pause in 1 2 4 8; do
        [ -n "$1$2" ] || exit 1
        [ -z "$2" ] || break
        scontrol update JobId="$JOB" ExcNodeList="$1" && exit 1
        sleep "$pause"
    done
    said=${2:-it could not be kept from these nodes, $1}
    for pause in 1 2 4 8; do
        scontrol hold "$JOB" && break
        sleep "$pause"
    done
    scontrol update JobId="$JOB" Comment="r1hpc: $said"
    echo "job $JOB is held: $said. scontrol release $JOB lets it go on"
    exit 1
}

# Have the job run on other nodes, because of $1, as long as few were excluded.
run_elsewhere() {
    local list pause said
    # Asked until it is said: the new list takes the place of the old one, which may be the user's own.
    for pause in 1 2 4 8 15 30 30; do
        said=$(scontrol show job -o "$JOB" 2> /dev/null)
        [[ ${said#* UserId=} =~ \ ExcNodeList=([^ ]*) ]] && break
        sleep "$pause" & wait $!
    done
    list=${BASH_REMATCH[1]:-}
    if [[ $said =~ \ ReqNodeList=([^ ]*) ]] &&
        scontrol show hostnames "${BASH_REMATCH[1]}" | grep -qx "$SLURMD_NODENAME"; then
        run_again "" "$1, and the job asks for $SLURMD_NODENAME by name"
    fi
    [ -n "$list" ] || { echo "$1: this job runs again, where Slurm chooses"; run_again; }
    list=${list/#(null)/}
    list=${list:+$list,}$SLURMD_NODENAME
    echo "$1: this job goes on without $SLURMD_NODENAME"
    if [ "$(scontrol show hostnames "$list" | wc -l)" -gt 4 ]; then
        echo "not again: $list are excluded already"
        exit 1
    fi
    [ -z "$RUN_DIR" ] || echo "$1" > "$RUN_DIR/logs/excluded-$SLURMD_NODENAME.txt"
    run_again "$list"
}

# Run the function $1 until it succeeds, for two minutes. Status 3 is final; 2 only of a python started by its
# path: `uv run python` leaves with 2 where uv itself fails.
patiently() {
    local pause status
    for pause in 2 5 10 20 30 30 30; do
        "$1" && return
        status=$?
        case $1/$status in */3 | prepare/2) exit 1 ;; esac
        case $(why_ending) in
            cancel | requeue | elsewhere) exit 1 ;;
            grace | limit | over) run_again ;;
        esac
        echo "$1 failed with status $status: again in $pause s"
        sleep "$pause" & wait $!
    done
    [ "$status" != 4 ] || run_again "" "${ATTEMPT:-the disk of the run is full}"
    run_elsewhere "$1 failed with status $status, see slurm-$SLURM_JOB_ID.out"
}

# Slurm fails a job whose log it cannot open, before any line of it runs: on a node that does not see this
# folder it must begin, to ask for another node. So the log is opened here, unless sbatch was given one.
open_log() {
    cd "${SLURM_SUBMIT_DIR:-$PWD}" || return
    [ ! /dev/stdout -ef /dev/null ] || exec >> "slurm-$SLURM_JOB_ID.out" 2>&1
}
patiently open_log

# -- the site: your `module load` lines, or a profile in configs/cluster/ named by $R1HPC_CLUSTER --

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
WORDS=("$@" --run-root "$RUN_ROOT" --run-name "$RUN_NAME")

# Make the run folder, or find it again, with the code and the interpreter that are there on the first start.
prepare() {
    local checkout=${SLURM_SUBMIT_DIR:-$PWD} code
    [ -f "$checkout/r1hpc/submit.py" ] || checkout=$(dirname "$checkout")
    for PYTHON in "${R1HPC_PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$checkout/.venv/bin/python"
    do
        [ -x "$PYTHON" ] && break
    done
    [ -x "$PYTHON" ] || PYTHON=$(command -v python3) || { echo "no python: set R1HPC_PYTHON"; return 1; }
    # A requeued job runs the code frozen on its first start, whatever has become of the checkout; a folder
    # without a whole line on record is half made, and is made anew from the checkout.
    code=$checkout
    if grep -qs '}$' "$RUN_ROOT/$RUN_NAME/attempts.jsonl"; then
        only_ours "$RUN_ROOT/$RUN_NAME" || return
        code=$RUN_ROOT/$RUN_NAME/code
    fi
    [ -f "$code/r1hpc/submit.py" ] && export PYTHONSAFEPATH=1 PYTHONPATH="$code${SITE_PATH:+:$SITE_PATH}"
    PREPARED=$("$PYTHON" -m r1hpc.submit --prepare-only "${WORDS[@]}")
}
SITE_PATH=${PYTHONPATH:-}
patiently prepare
read -r RANKS_PER_NODE RUN_DIR <<< "$PREPARED"
RANK=("$PYTHON") STEP=() CONTRACT=1
cd "$RUN_DIR" && only_ours . || exit 1
. "$RUN_DIR/site.sh"

# -- begin, one srun task per rank, end --
# The shell outlives the warning: a handler (an ignored signal would be inherited by the ranks) lets bash
# wait for srun to end, and then act. Started again after a preemption, it comes back to this line.
HURRY=
[ -e FINISHED ] && { echo "$RUN_DIR is finished: nothing to do"; exit 0; }
export PYTHONSAFEPATH=1 PYTHONPATH="$RUN_DIR/code${PYTHONPATH:+:$PYTHONPATH}"
# begin counts the ranks; an exclusive job's own number of tasks is not that of its ranks.
TASKS="$RANKS_PER_NODE(x$SLURM_JOB_NUM_NODES)"
try_begin() {
    local status real said payload=
    # Not on the run's disk where there is another one with room, as the write tells.
    { said=$(mktemp) && echo 0000000 > "$said"; } 2> /dev/null || said=logs/begin-$SLURM_JOB_ID-$$.txt
    # In the background, so that TERM is heard: some sites send it to this shell alone, and begin may
    # build a dataset for hours.
    SLURM_TASKS_PER_NODE=$TASKS "${PYTHON[@]}" -m r1hpc.launch begin "$RUN_DIR" $payload > "$said" &
    while true; do
        wait $!
        status=$?
        kill -0 $! 2> /dev/null || break
        [ -z "$(why_ending)" ] || kill -TERM $! 2> /dev/null
    done
    # It may have ended just as a signal came, whose number wait has told then.
    wait $! 2> /dev/null
    real=$?
    [ "$real" = 127 ] || status=$real
    ATTEMPT=$(cat "$said")
    rm -f "$said"
    return "$status"
}
begin() {
    local status
    try_begin
    status=$?
    # Code of 0.1.0 has no other status for what is final.
    case $status in 1 | 2) [ "$CONTRACT" -ge 2 ] || status=3 ;; esac
    return "$status"
}
patiently begin
[ -n "$ATTEMPT" ] || exit 0
export R1HPC_ATTEMPT=$ATTEMPT

# What every node has: the batch host, of which SLURM_CPUS_ON_NODE tells, may have more than others.
fewest_cpus() {
    local cpus least=
    for cpus in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do # "128(x2),96"
        cpus=${cpus%%(*}
        [ -n "$least" ] && [ "$least" -le "$cpus" ] || least=$cpus
    done
    echo "${least:-${SLURM_CPUS_ON_NODE:-1}}"
}
CPUS=${SLURM_CPUS_PER_TASK:-$(($(fewest_cpus) / RANKS_PER_NODE))}
[ "$CPUS" -ge 1 ] || CPUS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
# srun obeys the NONE that `sbatch --export=NONE` leaves here (sbatch(1)): the ranks need what is set above.
export SLURM_EXPORT_ENV=ALL

# srun takes --cpus-per-task from nobody since Slurm 22.05. --wait: ranks that saved leave one by one while
# rank 0 commits; one that is left alone does not hold the nodes until the time limit.
srun --unbuffered --kill-on-bad-exit=1 --wait=600 --distribution=block \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \
    --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS" ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"} "${STEP[@]}" \
    --output="$RUN_DIR/logs/attempt_$ATTEMPT/rank_%t.out" \
    "${RANK[@]}" -u -m r1hpc.launch rank "$RUN_DIR" &
SRUN=$!
# In the background, so that TERM is heard. At the end of the time limit, and of the grace time where
# PreemptMode is CANCEL, KILL follows after KillWait and Slurm does not start the job again: whoever is still
# busy 15 s before that is left behind. Any other TERM is the ranks'.
while true; do
    wait "$SRUN"
    STATUS=$?
    kill -0 "$SRUN" 2> /dev/null || break
    if [[ $(why_ending) =~ limit|grace ]]; then
        HURRY=--hurry
        KILL_WAIT=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
        timeout "$((KILL_WAIT > 17 ? KILL_WAIT - 15 : 2))" tail --pid="$SRUN" -f /dev/null
        kill -KILL "$SRUN" 2> /dev/null
    fi
done

# No rank is left to inherit this: the last record is not cut short by the TERM of a requeue.
trap '' TERM USR2
[ "$CONTRACT" -ge 2 ] || HURRY=
"${PYTHON[@]}" -m r1hpc.launch end "$RUN_DIR" --attempt "$ATTEMPT" --status "$STATUS" $HURRY
case $? in
    0) exit 0 ;;
    3) exit 1 ;; # over, and on record
    1) [ "$CONTRACT" -ge 2 ] || exit 1 ;;
esac
echo "attempt $ATTEMPT could not be judged: the next one will do it"
# An empty file, which a full disk may still take, says that the requeue is ours, where nobody was faster.
[[ $(why_ending) =~ requeue|elsewhere ]] || : > "attempts/$ATTEMPT/requeued-$STATUS"
run_again
