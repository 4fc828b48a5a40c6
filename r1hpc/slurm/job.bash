# The part of a job script that Python cannot do. job.sh sources it from the run's frozen code, sbatch/train.sh at
# first from the clone or the installed package.
#
#   patiently FUNCTION …   run it until it succeeds, for two minutes; then have the job run on another node
#   prepare [WORD …]       train.sh: make the run folder, or find it; set RUN_DIR, RANKS_PER_NODE, RANK, STEP
#   begin [--payload]      begin an attempt; set ATTEMPT and CPUS for srun
#   end PID                wait for srun, record why the attempt ended, and have the job run again if it must
#
# The script sets RUN_DIR, PYTHON, RANKS_PER_NODE, CONTRACT, PATIENCE and MOST_EXCLUDED, and has only_ours; train.sh
# also RUN_ROOT, RUN_NAME and CLONE, and has site, which sets PYTHON.

ATTEMPT=''
WHOLE=${RUN_DIR:+$0} # a copy of job.sh, which takes no arguments
SITE_PATH=${PYTHONPATH:-}

# sbatch brings along the environment of its caller, which may be another job, of an array or started again.
if [ -n "${SLURM_ARRAY_TASK_ID:-}${SLURM_RESTART_COUNT:-}" ]; then
    SHOWN=$(scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null)
    if [ -n "$SHOWN" ] && [[ ${SHOWN%% JobName=*} != *ArrayTaskId=* ]]; then
        unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
        # Of a job that is requeued while this script starts it counts one start too many.
        [[ ${SHOWN#* UserId=} =~ \ JobState=RUNNING\ (.*\ )?Restarts=([0-9]+) ]] &&
            export SLURM_RESTART_COUNT="${BASH_REMATCH[2]}"
    fi
fi
JOB=$SLURM_JOB_ID # of an array's task that may be the whole array's
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# Slurm 23.02 and newer tell a job when its time limit ends.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    TIMES=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$JOB" --format='%S %e' 2> /dev/null)
    read -r BEGAN ENDS <<< "$TIMES"
    [ -z "$BEGAN" ] || SLURM_JOB_START_TIME=$(date -d "$BEGAN" +%s 2> /dev/null)
    [ -z "$ENDS" ] || SLURM_JOB_END_TIME=$(date -d "$ENDS" +%s 2> /dev/null)
    export SLURM_JOB_START_TIME SLURM_JOB_END_TIME
fi

# Why Slurm ends the job: cancel, grace, limit, requeue; nothing where it does not, or does not answer. over: Slurm
# has lost a node, and takes the job for ended. elsewhere: it has started the job again on other nodes.
why_ending() {
    local said state reason='' grace='' word
    said=$(scontrol show job -o "$JOB" 2> /dev/null)
    said=${said#* UserId=}
    [[ $said =~ \ JobState=([A-Z_]+) ]] || return
    state=${BASH_REMATCH[1]}
    [[ $said =~ \ Reason=([^ ]*) ]] && reason=${BASH_REMATCH[1]}
    # The end of a grace time moves PreemptTime to the end of the job.
    [[ $said =~ \ EndTime=([^ ]+)\ .*\ PreemptTime=([^ ]+) ]] && [ "${BASH_REMATCH[1]}" = "${BASH_REMATCH[2]}" ] &&
        grace=grace
    word=$(ending "$state/$reason/$grace")
    if [ "$state/$word" = COMPLETING/over ] || [ "$word" != over ]; then
        [[ $said =~ \ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0})) &&
            if [ -n "$word" ]; then word=requeue; else word=elsewhere; fi
    fi
    echo "$word"
}

ending() {
    case $1 in
        # -- endings, from r1hpc/slurm/shell/endings.py, which writes these lines
        NODE_FAIL/*/* | BOOT_FAIL/*/*) echo over ;;
        OUT_OF_MEMORY/*/*) echo over ;;
        TIMEOUT/*/*) echo over ;;
        DEADLINE/*/*) echo over ;;
        FAILED/*/*) echo over ;;
        COMPLETING/NodeDown/*) echo over ;;
        PREEMPTED/*/*) echo grace ;;
        COMPLETING/*/grace) echo grace ;;
        COMPLETING/TimeLimit/*) echo limit ;;
        COMPLETING/*exceeds*/*) echo limit ;;
        PENDING/*/* | REQUEUED/*/* | REQUEUE_HOLD/*/*) echo requeue ;;
        COMPLETING/*/* | CANCELLED/*/*) echo cancel ;;
        # -- end of endings
    esac
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
    [ -z "${INCLUDE+given}" ] || scontrol update JobId="$JOB" ExcNodeList="$INCLUDE"
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
    if [ "$(scontrol show hostnames "$list" | wc -l)" -gt "$MOST_EXCLUDED" ]; then
        echo "not again: $list are excluded already"
        exit 1
    fi
    [ -z "$RUN_DIR" ] || echo "$1" > "$RUN_DIR/logs/excluded-$SLURMD_NODENAME.txt"
    run_again "$list"
}

# Because of $1 another node tells whether this one is at fault: the same words there hold the job.
hold_on_second_node() {
    local said first
    said=$(scontrol show job -o "$JOB" 2> /dev/null)
    said=${said#* UserId=}
    if [[ $said == *" Comment=r1hpc: "*" cannot begin: $1"* ]]; then
        first=${said#* Comment=r1hpc: } first=${first%% *}
        [[ $said =~ \ ExcNodeList=([^ ]*) ]]
        INCLUDE=$(scontrol show hostnames "${BASH_REMATCH[1]/#(null)/}" 2> /dev/null | grep -vx "$first" | paste -sd,)
        rm -f "$RUN_DIR/logs/excluded-$first.txt"
        run_again "" "$1, on $first and $SLURMD_NODENAME"
    fi
    scontrol update JobId="$JOB" Comment="r1hpc: $SLURMD_NODENAME cannot begin: $1"
    run_elsewhere "$1"
}

# Status 3 is final; 2 only of a python started by its path: `uv run python` leaves with 2 where uv itself fails.
patiently() {
    local pause status
    for pause in $PATIENCE; do
        "$@" && return
        status=$?
        case $1/$status in */3 | prepare/2) exit 1 ;; esac
        case $(why_ending) in
            cancel | requeue | elsewhere) exit 1 ;;
            grace | limit | over) run_again ;;
        esac
        echo "$1 failed with status $status: again in $pause s"
        sleep "$pause" & wait $!
    done
    case $status in
        4) run_again "" "${ATTEMPT:-the disk of the run is full}" ;;
        5) hold_on_second_node "${ATTEMPT:-the disk of the run cannot be written}" ;;
        126 | 127) hold_on_second_node "${PYTHON[*]} cannot be started" ;;
        1) [ -f "$RUN_DIR/code/r1hpc/launch.py" ] || [ -z "$RUN_DIR" ] ||
            run_again "" "the frozen code is incomplete: $RUN_DIR/code" ;;
    esac
    run_elsewhere "$1 failed with status $status, see slurm-$SLURM_JOB_ID.out"
}

prepare() {
    local code=$CLONE said
    # Variables of the interactive step in which sbatch was called: srun would take them for options.
    unset SLURM_CPU_BIND SLURM_CPU_BIND_{TYPE,LIST,VERBOSE} SLURM_MEM_BIND SLURM_MEM_BIND_{TYPE,LIST,VERBOSE} \
        SLURM_MEM_PER_{CPU,GPU,NODE} SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
    # Set to 1 by such an sbatch, though nobody asked for it and the job may have whole nodes.
    [ "${SLURM_CPUS_PER_TASK:-}" != 1 ] || unset SLURM_CPUS_PER_TASK
    site || { echo "no python: set R1HPC_PYTHON"; return 1; }
    # A requeued job runs the code frozen on its first start, whatever has become of the clone; a folder
    # without a whole line on record is half made, and is made anew from the clone.
    if grep -qs '}$' "$RUN_ROOT/$RUN_NAME/attempts.jsonl"; then
        only_ours "$RUN_ROOT/$RUN_NAME" || return
        code=$RUN_ROOT/$RUN_NAME/code
    fi
    [ -f "$code/r1hpc/submit.py" ] && export PYTHONSAFEPATH=1 PYTHONPATH="$code${SITE_PATH:+:$SITE_PATH}"
    said=$("$PYTHON" -m r1hpc.submit --prepare-only --run-root "$RUN_ROOT" --run-name "$RUN_NAME" "$@") || return
    read -r RANKS_PER_NODE RUN_DIR <<< "$said"
    RANK=("$PYTHON") STEP=() CONTRACT=1
    cd "$RUN_DIR" && only_ours . || exit 1
    . ./site.sh
}

begin() {
    local status code=$RUN_DIR/code
    [ -e FINISHED ] && { echo "$RUN_DIR is finished: nothing to do"; exit 0; }
    [[ :${PYTHONPATH:-}: = ":$code:"* ]] || export PYTHONSAFEPATH=1 PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"
    # submitit unpickles its payload: refused unless it is a plain file that only you can write. begin sees to
    # that, and puts it on record, where the frozen code knows how.
    if [ $# = 1 ] && [ "$CONTRACT" -lt 3 ]; then
        "${PYTHON[@]}" -m r1hpc.slurm.payload "$RUN_DIR" && shift
    fi && ask_for_attempt "$@"
    status=$?
    # Code of 0.1.0 has no other status for what is final.
    case $status in 1 | 2) [ "$CONTRACT" -ge 2 ] || status=3 ;; esac
    [ "$status" = 0 ] || return "$status"
    [ -n "$ATTEMPT" ] || exit 0
    CPUS=${SLURM_CPUS_PER_TASK:-$(($(fewest_cpus) / RANKS_PER_NODE))}
    [ "$CPUS" -ge 1 ] || CPUS=1
    # srun obeys the NONE that `sbatch --export=NONE` leaves here (sbatch(1)): the ranks need what is set here.
    export R1HPC_ATTEMPT="$ATTEMPT" SUBMITIT_EXECUTOR=slurm SLURM_EXPORT_ENV=ALL
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS}"
}

ask_for_attempt() {
    local status real said
    # Not on the run's disk where there is another one with room, as the write tells.
    { said=$(mktemp) && echo 0000000 > "$said"; } 2> /dev/null || said=logs/begin-$SLURM_JOB_ID-$$.txt
    # In the background, so that TERM is heard: some sites send it to this shell alone, and begin may
    # build a dataset for hours. It counts the ranks; an exclusive job's own number of tasks is not theirs.
    SLURM_TASKS_PER_NODE="$RANKS_PER_NODE(x$SLURM_JOB_NUM_NODES)" \
        "${PYTHON[@]}" -m r1hpc.launch begin "$RUN_DIR" "$@" > "$said" &
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

# The CPUs that every node has: the batch host, which SLURM_CPUS_ON_NODE counts, may have more than others.
fewest_cpus() {
    local cpus least=''
    for cpus in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do # "128(x2),96"
        cpus=${cpus%%(*}
        [ -n "$least" ] && [ "$least" -le "$cpus" ] || least=$cpus
    done
    echo "${least:-${SLURM_CPUS_ON_NODE:-1}}"
}

end() {
    local status kill_wait reason hurry=()
    # In the background, so that TERM is heard. At the end of the time limit, and of the grace time where
    # PreemptMode is CANCEL, KILL follows after KillWait and Slurm does not start the job again: whoever is
    # still busy 15 s before that is left behind. Any other TERM is the ranks'.
    while true; do
        wait "$1"
        status=$?
        kill -0 "$1" 2> /dev/null || break
        if [[ $(why_ending) =~ limit|grace ]]; then
            hurry=(--hurry)
            kill_wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
            timeout "$((kill_wait > 17 ? kill_wait - 15 : 2))" tail --pid="$1" -f /dev/null
            kill -KILL "$1" 2> /dev/null
        fi
    done
    # No rank is left to inherit this: the last record is not cut short by the TERM of a requeue.
    trap '' TERM USR2
    [ "$CONTRACT" -ge 2 ] || hurry=()
    reason=$(R1HPC_REASON_FD=3 "${PYTHON[@]}" -m r1hpc.launch end "$RUN_DIR" --attempt "$ATTEMPT" \
        --status "$status" "${hurry[@]}" 3>&1 >&2)
    case $? in
        0) exit 0 ;;
        3) exit 1 ;; # over, and on record
        4) run_again "" "${reason:-neither the run nor the node is at fault}" ;;
        1) [ "$CONTRACT" -ge 2 ] || exit 1 ;;
    esac
    echo "attempt $ATTEMPT could not be judged: the next one will do it"
    # An empty file, which a full disk may still take, says that the requeue is ours, where nobody was faster.
    [[ $(why_ending) =~ requeue|elsewhere ]] || : > "attempts/$ATTEMPT/requeued-$status"
    run_again
}
