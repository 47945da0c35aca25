# The part of launch.sh that knows the nodes of rollout servers, the second component of a
# heterogeneous job, and starts and ends the servers on them.
# shellcheck shell=bash

# nodes of the servers; none in other jobs
SERVER_NODELIST="" SERVERS_PID=""

# In a job of two components: `launch rl` with the servers in the arguments.
launch_with_servers() {
    local urls
    require_job "$@"
    require_server_job
    count_servers
    urls=$(server_urls)
    launch rl "$@" rl.rollout.engine=vllm "rl.rollout.server.urls=[$urls]"
}

require_server_job() {
    [[ ${SLURM_HET_SIZE:-1} == 2 && -n ${SLURM_JOB_NODELIST_HET_GROUP_1:-} ]] ||
        fail "this is no job of two components: sbatch --nodes=N : --nodes=M slurm/rl_servers.sbatch" \
            "..., N nodes to train and M for servers"
    [[ -n ${SERVER_MODEL:-} ]] || fail "SERVER_MODEL is not set: export the folder that the servers" \
        "start with before sbatch, see \`bash slurm/rl_servers.sbatch --help\`"
    [[ -f $SERVER_MODEL/config.json ]] || fail "SERVER_MODEL=$SERVER_MODEL has no config.json"
}

# What the second component holds, and how many servers that makes. slurm/server.sh takes its part.
count_servers() {
    SERVER_NODELIST=$SLURM_JOB_NODELIST_HET_GROUP_1
    # "a100:8" is 8. Where Slurm does not say, nodes are as those that train
    SERVER_NODE_GPUS=${SLURM_GPUS_PER_NODE_HET_GROUP_1:-${SLURM_GPUS_ON_NODE:-}}
    SERVER_NODE_GPUS=${SERVER_NODE_GPUS##*:}
    # "16(x2),8" is 8: as many as each node has
    SERVER_NODE_CPUS=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1" |
        sed 's/(.*//' | sort -n | head -n 1)
    export SERVER_TENSOR_PARALLEL=${SERVER_TENSOR_PARALLEL:-${SERVER_NODE_GPUS:-1}}
    export SERVER_PORT=${SERVER_PORT:-8000}
    local gpus=${SERVER_NODE_GPUS:-$SERVER_TENSOR_PARALLEL}
    SERVERS_PER_NODE=$((gpus / SERVER_TENSOR_PARALLEL))
    ((SERVERS_PER_NODE * SERVER_TENSOR_PARALLEL == gpus && gpus)) ||
        fail "SERVER_TENSOR_PARALLEL=$SERVER_TENSOR_PARALLEL does not divide the $gpus GPUs of a node"
    ((SERVER_NODE_CPUS >= SERVERS_PER_NODE)) ||
        fail "$SERVERS_PER_NODE servers on $SERVER_NODE_CPUS CPUs of a node"
}

# 'http://node9:8000','http://node9:8001',... as slurm/server.sh has them listen.
server_urls() {
    local host index urls=()
    while read -r host; do
        for ((index = 0; index < SERVERS_PER_NODE; index++)); do
            urls+=("'http://$host:$((SERVER_PORT + index))'")
        done
    done < <(scontrol show hostnames "$SERVER_NODELIST")
    (IFS=,; echo "${urls[*]}")
}

# In OPTIONS what steps on the servers' nodes need, for so many processes on each.
server_step_options() {
    OPTIONS=(--het-group=1 --cpus-per-task=$((SERVER_NODE_CPUS / $1)))
    [[ -z $SERVER_NODE_GPUS ]] || OPTIONS+=(--gpus-per-node="$SERVER_NODE_GPUS" --gpu-bind=none)
}

# start_servers LOGS: all of them, in one step beside that of the ranks. One that is given up does not
# end the others.
start_servers() {
    local nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_1
    server_step_options "$SERVERS_PER_NODE"
    say "$((nodes * SERVERS_PER_NODE)) servers on $nodes nodes, a log of each in $1"
    srun "${OPTIONS[@]}" "${SERVER_SRUN_OPTIONS[@]}" --nodes="$nodes" \
        --ntasks=$((nodes * SERVERS_PER_NODE)) --ntasks-per-node="$SERVERS_PER_NODE" \
        --kill-on-bad-exit=0 --wait=0 --output="$1/server_%4t.log" --open-mode=append \
        bash slurm/server.sh &
    SERVERS_PID=$!
}

# Before anything is decided on the nodes: servers hold the memory that the health check looks at.
end_servers() {
    local tries
    if ! kill -TERM "$SERVERS_PID" 2>/dev/null; then
        say "the servers had ended before: see the end of server_*.log"
        return
    fi
    # not for ever: what is left then ends with the job
    for ((tries = 0; tries < 600; tries++)); do
        kill -0 "$SERVERS_PID" 2>/dev/null || break
        sleep 0.1 || true
    done
    say "the servers are ended"
}
