# The part of launch.sh that runs the step on all nodes and decides what comes after it.
# shellcheck shell=bash

# exit status of a rank that stopped because it was asked to, with a checkpoint (EX_TEMPFAIL)
STOPPED=75
# exit status of a rank that gave up waiting for the others (as of `timeout`)
HUNG=124
STEP_PID="" ASKED=""

# Called for USR1, which Slurm sends to this script alone when the time limit is near (--signal=B:).
# srun hands what it gets on to all ranks: they finish the update, write a checkpoint and end.
ask_to_stop() {
    if [[ -n $STEP_PID ]]; then
        ASKED=yes
        say "time limit near: the ranks are asked to stop"
        kill -USR1 "$STEP_PID" 2>/dev/null || true
    fi
}

# train FOLDER OPTIONS_OF_SRUN... COMMAND...: the step on all nodes, and what follows from its end. In
# the background, so that bash can act on signals meanwhile.
train() {
    local folder=$1 before status=0
    shift
    before=$(checkpoints "$folder")
    export OCC_ENDED=$folder.logs/$SLURM_JOB_ID/ended
    rm -rf "$OCC_ENDED"
    mkdir -p "$OCC_ENDED"
    step_options
    srun "${OPTIONS[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$WORLD_SIZE" \
        --ntasks-per-node="$TASKS_PER_NODE" --kill-on-bad-exit=1 "$@" &
    STEP_PID=$!
    finish "$STEP_PID" || status=$?
    STEP_PID=""
    ! ranks_ended_with "$STOPPED" || status=$((status ? status : STOPPED))
    say "ended with exit status $status"
    [[ -z $SERVERS_PID ]] || end_servers
    settle "$folder" "$before" "$status"
}

# Wait for a process, and return its status. USR1 interrupts `wait`, which then returns as if that had
# ended the process.
finish() {
    local status=0 alive
    wait "$1" || status=$?
    while ((status == 128 + $(kill -l USR1))); do
        alive=""
        ! kill -0 "$1" 2>/dev/null || alive=yes
        status=0
        wait "$1" || status=$?
        [[ -n $alive ]] || break
    done
    return "$status"
}

# Requeue what can go on. The status is that of the job, unless it is requeued.
settle() {
    local folder=$1 before=$2 status=$3
    ((status)) || return 0
    # Slurm requeues a preempted job itself, but not one that ends within the time of grace
    if was_preempted; then
        requeue "the next attempt goes on from the last checkpoint"
    elif [[ -n $ASKED || $status == "$STOPPED" ]]; then
        requeue_if_progress "$folder" "$before"
    else
        requeue_after_failure "$folder"
    fi || return "$status"
}

# Start again from the last checkpoint, unless that would be the one this attempt began with: such a
# job would go round for ever.
requeue_if_progress() {
    if [[ $(checkpoints "$1") == "$2" ]]; then
        say "no checkpoint since the start of this attempt: not requeued. Save more often" \
            "(pretrain.save_every, rl.save_every) or ask for more time."
        return 1
    fi
    requeue "the next attempt goes on from the last checkpoint"
}

# After an error: a bad node is left out, and a job whose ranks hung tries again, once without progress.
requeue_after_failure() {
    local folder=$1 mark=$1.logs/$SLURM_JOB_ID/tried_again now
    say "what happened: the log of the first task that srun names above"
    check_nodes "$folder"
    if [[ -n $BAD_NODES ]]; then
        requeue_without "$BAD_NODES" "$folder"
        return
    fi
    ranks_ended_with "$HUNG" || return 1
    now=$(checkpoints "$folder")
    if [[ -f $mark && $(<"$mark") == "$now" ]]; then
        say "a rank waited too long for the others again, without a checkpoint in between: not requeued"
        return 1
    fi
    echo "$now" >"$mark"
    requeue "a rank waited too long for the others; tried again once"
}

ranks_ended_with() {
    grep -qxr "$1" "$OCC_ENDED" 2>/dev/null
}

requeue() {
    say "requeueing: $1"
    # requeueing ends this script, which may have more to say to Slurm
    trap '' TERM
    scontrol requeue "$(job_name)" || {
        say "that failed: submit the same command again"
        return 1
    }
}

# requeue_without NODES FOLDER. Slurm lets the list of excluded nodes be changed while a job waits in the
# queue, which it does once it is requeued.
requeue_without() {
    local shown excluded=$1 file=$2.logs/$SLURM_JOB_ID/left_out count=0
    shown=$(scontrol show job --oneliner "$(job_name)")
    # those that were left out already, by --exclude or by an earlier attempt
    [[ ! $shown =~ ExcNodeList=([^ ()]+) ]] || excluded=${BASH_REMATCH[1]},$1
    # what seems to be the node's fault on one after the other is not
    [[ ! -f $file ]] || count=$(wc -l <"$file")
    if ((count >= 5)); then
        say "five attempts have left out nodes: not requeued, see $file"
        return 1
    fi
    echo "$1" >>"$file" || return
    requeue "not on $1, which failed the health check" || return
    scontrol update JobId="$(job_name)" ExcNodeList="$excluded" ||
        say "$1 could not be excluded: scontrol update JobId=$(job_name) ExcNodeList=$excluded"
}

was_preempted() {
    [[ $(scontrol show job --oneliner "$(job_name)") =~ PreemptTime=[0-9] ]]
}

# Complete checkpoints of a run, or of all runs of a study; one that was being written ends in .tmp.
checkpoints() {
    find "$1" -type d -name "step_*" -prune ! -name "*.tmp" ! -name "*.broken" ! -name "*.old" 2>/dev/null | sort || true
}

# Check all nodes at once, a step for each, and name in BAD_NODES those that fail or do not answer. If
# all of several fail, it is not the nodes.
check_nodes() {
    local folder=$1.logs/$SLURM_JOB_ID/health host hosts=() step steps=() bad=()
    BAD_NODES=""
    [[ ${HEALTH_SECONDS:-300} != 0 ]] || return 0
    mkdir -p "$folder"
    step_options
    start_checks "$SLURM_JOB_NODELIST" "${GPUS:-0}"
    if [[ -n $SERVER_NODELIST ]]; then
        server_step_options 1
        OPTIONS+=("${SRUN_OPTIONS[@]}")
        start_checks "$SERVER_NODELIST" "${SERVER_NODE_GPUS:-0}"
    fi
    for step in "${steps[@]}"; do
        finish "$step" || true
    done
    for host in "${hosts[@]}"; do
        ! grep -qx healthy "$folder/$host" || continue
        bad+=("$host")
        say "$host failed the health check: $(grep -m 1 "^unhealthy: " "$folder/$host" ||
            echo "no answer, see $folder/$host")"
    done
    if ((${#bad[@]} > 1 && ${#bad[@]} == ${#hosts[@]})); then
        say "all nodes failed the health check: none is left out, since it is not the nodes"
        return 1
    fi
    BAD_NODES=$(IFS=,; echo "${bad[*]}")
}

# start_checks NODES GPUS: with OPTIONS, in the folder, hosts and steps of check_nodes.
start_checks() {
    local host found
    mapfile -t found < <(scontrol show hostnames "$1")
    for host in "${found[@]}"; do
        timeout --kill-after=30 "${HEALTH_SECONDS:-300}" srun "${OPTIONS[@]}" --nodes=1 --ntasks=1 \
            --nodelist="$host" bash slurm/health.sh --folder "$folder" --gpus "$2" \
            --free-memory "${HEALTH_FREE_MEMORY:-50}" \
            --free-gpu-memory "${HEALTH_FREE_GPU_MEMORY:-90}" >"$folder/$host" 2>&1 &
        steps+=($!)
    done
    hosts+=("${found[@]}")
}

# Before the job starts: a node that fails the check is left out of the next attempt.
require_healthy_nodes() {
    check_nodes "$1" || fail "no node is healthy, see above"
    [[ -n $BAD_NODES ]] || return 0
    requeue_without "$BAD_NODES" "$1" || true
    exit 1
}
