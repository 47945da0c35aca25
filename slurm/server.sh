#!/bin/bash
# One vLLM server of a job, with its share of the node's GPUs. When it ends it is started again, with the
# weights of SERVER_MODEL: the trainer gives it the present ones. Called by servers.sh, a process for each
# server.

for name in SLURM_LOCALID SERVER_MODEL SERVER_PORT SERVER_TENSOR_PARALLEL; do
    if [[ -z ${!name:-} ]]; then
        echo "error: $name is not set: slurm/server.sh is called by slurm/rl_servers.sbatch." \
            "Submit that with sbatch, see docs/cluster.md" >&2
        exit 1
    fi
done

# before `set -u`, as in rank.sh
# shellcheck source=slurm/site.sh
source "${OCC_SITE:-slurm/site.sh}" || exit
site_environment
set -euo pipefail

# a server that ends so often in a row, each time within so many seconds, does not come up at all
MOST_STARTS=5 SHORT=600
PAUSE=${SERVER_PAUSE:-5} # seconds before the next start
SERVER=""

main() {
    local starts=0 begun status port=$((SERVER_PORT + SLURM_LOCALID)) drafts
    drafts=${SERVER_DRAFTS:-$(depths)}
    trap 'end_server; exit 143' TERM
    # meant for the ranks, where somebody signals the whole job; vLLM ignores it too then
    trap '' USR1
    choose_gpus
    set_environment
    while ((starts < MOST_STARTS)); do
        begun=$SECONDS status=0
        say "server on $(hostname), port $port"
        serve "$port" "$drafts" &
        SERVER=$!
        wait "$SERVER" || status=$?
        end_server
        say "the server ended with exit status $status"
        ((SECONDS - begun < SHORT)) || starts=0
        starts=$((starts + 1))
        # in the background, so that bash can act on signals meanwhile
        sleep "$PAUSE" &
        wait $!
    done
    say "ended $MOST_STARTS times in a row within $SHORT seconds of its start: given up"
    exit 1
}

# A group of processes of its own, so that nothing of a dead server stays behind on the GPUs.
serve() {
    local more=()
    read -ra more <<<"${SERVER_OPTIONS:-}"
    (($2 == 0)) || more+=(--speculative-config "{\"method\": \"mtp\", \"num_speculative_tokens\": $2}")
    exec setsid "${VLLM:-vllm}" serve "$SERVER_MODEL" --port "$1" \
        --tensor-parallel-size "$SERVER_TENSOR_PARALLEL" \
        --worker-extension-cls megatron_occ.rollout.remote.vllm_worker.ReloadExtension "${more[@]}"
}

end_server() {
    [[ -z $SERVER ]] || kill -KILL -- "-$SERVER" 2>/dev/null || true
}

# 1 if servers draft with the folder's MTP layer, of which they get the first depth: the architectures in
# docs/rollout-servers.md.
depths() {
    local file=$SERVER_MODEL/config.json
    if grep -Eq '"(MiMo|Glm4Moe|DeepseekV3)ForCausalLM"' "$file" &&
        grep -Eq '"num_nextn_predict_layers": *[1-9]' "$file"; then
        echo 1
    else
        echo 0
    fi
}

# The step sees all GPUs of its node, as ranks do. Not every Slurm names them.
choose_gpus() {
    local all
    [[ -n ${SLURM_GPUS_ON_NODE:-} ]] || return 0
    IFS=, read -ra all <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))}"
    all=("${all[@]:SLURM_LOCALID * SERVER_TENSOR_PARALLEL:SERVER_TENSOR_PARALLEL}")
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${all[*]}")
    export CUDA_VISIBLE_DEVICES
}

set_environment() {
    # the endpoints by which weights are loaded
    export VLLM_SERVER_DEV_MODE=1
    [[ -z ${ROLLOUT_API_KEY:-} ]] || export VLLM_API_KEY=$ROLLOUT_API_KEY
    # the worker extension; slurm/ may be a link into the checkout
    PYTHONPATH=$(cd -P slurm/.. && pwd)${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
}

say() {
    echo "$(date '+%F %T') attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
}

main
