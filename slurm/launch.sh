# What the .sbatch files share. `launch COMMAND ARGUMENTS...` and `evaluate ARGUMENTS...` run megatron-occ
# on all nodes of the job, `convert ARGUMENTS...` and `compare ARGUMENTS...` one process of it.
# `launch_with_servers ARGUMENTS...` is in servers.sh.
# shellcheck shell=bash

# shellcheck source=slurm/site.sh
source "${OCC_SITE:-slurm/site.sh}"
# shellcheck source=slurm/step.sh
source slurm/step.sh
# shellcheck source=slurm/servers.sh
source slurm/servers.sh

launch() {
    local command=$1 run_dir
    shift
    require_job "$@"
    trap ask_to_stop USR1 # two minutes before the time limit: see --signal
    count_gpus
    set_rendezvous
    make_plan "$command" "$@"

    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        [[ " $*" != *" seed="* ]] || fail "an array gives seed=: leave it out, or leave out --array"
        run_dir=$run_dir/seed_$SLURM_ARRAY_TASK_ID
        set -- "$@" "seed=$SLURM_ARRAY_TASK_ID" "run_dir=$run_dir"
    fi
    claim "$run_dir"
    # requeued, or submitted again after a failure; a killed attempt may have left its lock alone
    if [[ -n $(find "$run_dir" -mindepth 1 -maxdepth 1 ! -name writer.lock 2>/dev/null) ]]; then
        set -- "$@" --resume
    fi
    run_on_all_nodes "$run_dir" "$command" "$@"
}

# Evaluation writes no checkpoints and can't be resumed: interrupted, it begins anew.
evaluate() {
    local run_dir
    require_job "$@"
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] ||
        fail "an evaluation takes no --array: give --checkpoint several times, or submit several jobs"
    count_gpus
    set_rendezvous
    make_plan eval "$@"
    run_on_all_nodes "$run_dir" eval "$@"
}

# Before all nodes start: one process checks the configuration and says what will run. It also knows
# run_dir, which may stand in a configuration file.
make_plan() {
    local plan
    plan=$(run_step --nodes=1 --ntasks=1 bash slurm/rank.sh "$@" --dry-run \
        --gpus-per-node "$TASKS_PER_NODE")
    echo "$plan"
    [[ $plan != *$'\n'"not found "* ]] || fail "files are not found, see above"
    run_dir=$(sed -n 's/^run_dir  *//p' <<<"$plan")
    [[ -n $run_dir ]] || fail "no run_dir in the plan above"
}

# run_on_all_nodes RUN_DIR COMMAND ARGUMENTS...
run_on_all_nodes() {
    # beside the run folder: megatron-occ starts a run in an empty one only
    local run_dir=$1 logs=$1.logs/$SLURM_JOB_ID
    shift
    mkdir -p "$logs"
    require_healthy_nodes "$run_dir"
    say "megatron-occ $*"
    [[ -z $SERVER_NODELIST ]] || start_servers "$logs"
    say "$WORLD_SIZE processes on $SLURM_JOB_NUM_NODES nodes, a log of each in $logs"
    train "$run_dir" --output="$logs/rank_%4t.log" --open-mode=append bash slurm/rank.sh "$@"
}

# One process with all CPUs of the job that converts a checkpoint; it needs no GPU.
convert() {
    require_job "$@"
    local held=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [[ -z $held ]] || say "this job holds GPUs ($held), which a conversion does not use: submit it" \
        "from a shell in which slurm/site.sh was not sourced"
    GPUS="" TASKS_PER_NODE=1
    set_rendezvous
    export WORLD_SIZE=1
    run_step --nodes=1 --ntasks=1 bash slurm/rank.sh convert "$@"
}

# One process that does the runs of a study, several at once; an element of an array its share of them.
compare() {
    local plan folder share
    require_job "$@"
    trap ask_to_stop USR1
    count_gpus
    TASKS_PER_NODE=1
    set_rendezvous
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        [[ " $*" != *" --share"* ]] || fail "an array gives --share: leave it out, or leave out --array"
        share=$(share_of_element)
        set -- "$@" --share "$share"
    fi
    plan=$(run_step --nodes=1 --ntasks=1 bash slurm/rank.sh compare "$@" --dry-run)
    echo "$plan"
    folder=$(sed -n 's/^folder  *//p' <<<"$plan")
    [[ -n $folder ]] || fail "no folder in the plan above"
    mkdir -p "$folder.logs/$SLURM_JOB_ID"
    require_healthy_nodes "$folder"
    say "megatron-occ compare $*"
    train "$folder" bash slurm/rank.sh compare "$@"
}

# I/N for the I-th of N elements, which may be numbered as in 1-7:2.
share_of_element() {
    local step=${SLURM_ARRAY_TASK_STEP:-1} last=$SLURM_ARRAY_TASK_MAX
    # shellcheck disable=SC2153  # MIN, not ID
    local first=$SLURM_ARRAY_TASK_MIN
    ((last - first == (SLURM_ARRAY_TASK_COUNT - 1) * step)) ||
        fail "the elements of the array, $first to $last, are not evenly spaced: give --array=1-N"
    echo "$(((SLURM_ARRAY_TASK_ID - first) / step + 1))/$SLURM_ARRAY_TASK_COUNT"
}

# Outside a job there is nothing to run: say how to submit it.
require_job() {
    local name
    if [[ -z ${SLURM_JOB_ID:-} && ${1:-} == --help ]]; then
        # the comment at the head of the script
        sed -n '2,/^#SBATCH/{/^#SBATCH/d; s/^# \{0,1\}//p}' "$0"
        exit
    fi
    for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST SLURM_CPUS_ON_NODE; do
        [[ -n ${!name:-} ]] || fail "$name is not set, so this is not the script of a Slurm job:" \
            "submit it with sbatch, see docs/cluster.md"
    done
}

# A process for each GPU; without GPUs as many as sbatch --ntasks-per-node says.
count_gpus() {
    # as asked for; an exclusive job may hold more than its steps get. "a100:8" is 8
    GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE_HET_GROUP_0:-${SLURM_GPUS_ON_NODE:-}}}
    GPUS=${GPUS##*:}
    if [[ -n ${SBATCH_GPUS_PER_NODE:-} && -z $GPUS ]]; then
        fail "this job has no GPUs: \`source slurm/site.sh\` before sbatch, or delete" \
            "SBATCH_GPUS_PER_NODE there"
    fi
    TASKS_PER_NODE=${GPUS:-${SLURM_NTASKS_PER_NODE:-1}}
}

# Environment of torch's rendezvous but for the ranks, which rank.sh sets.
set_rendezvous() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * TASKS_PER_NODE))
    export MASTER_ADDR=${hosts[0]}
    export MASTER_PORT=$((FIRST_PORT + SLURM_JOB_ID % NUMBER_OF_PORTS))
}

# In OPTIONS what all steps need. Every process sees all GPUs of its node and takes its LOCAL_RANK.
step_options() {
    # shellcheck disable=SC2153  # CPUS, not GPUS
    local cpus=$((SLURM_CPUS_ON_NODE / TASKS_PER_NODE))
    ((cpus > 0)) || fail "$TASKS_PER_NODE processes on $SLURM_CPUS_ON_NODE CPUs of a node"
    OPTIONS=(--cpus-per-task="$cpus")
    [[ -z $SERVER_NODELIST ]] || OPTIONS+=(--het-group=0)
    [[ -z $GPUS ]] || OPTIONS+=(--gpus-per-node="$GPUS" --gpu-bind=none)
    OPTIONS+=("${SRUN_OPTIONS[@]}")
}

run_step() {
    step_options
    srun "${OPTIONS[@]}" "$@"
}

# Refuse a run folder that another job is writing to, or will when its turn comes.
claim() {
    local file=$1.logs/job other
    mkdir -p "$1.logs"
    if [[ -f $file ]]; then
        other=$(<"$file")
        if [[ $other != "$(job_name)" && -n $(squeue --noheader --jobs="$other" 2>/dev/null) ]]; then
            fail "job $other uses run_dir=$1: cancel it, or give another run_dir="
        fi
    fi
    job_name >"$file"
}

# An element of an array by its own name: for one of them SLURM_JOB_ID means the whole array.
job_name() {
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

say() {
    echo "$(date '+%F %T') attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
}

fail() {
    echo "error: $*" >&2
    exit 1
}
