#!/bin/bash
# One process of a job: Slurm's names become torch's, then megatron-occ runs with the arguments.

for name in SLURM_PROCID SLURM_LOCALID WORLD_SIZE; do
    if [[ -z ${!name:-} ]]; then
        echo "error: $name is not set: slurm/rank.sh is called by the .sbatch scripts." \
            "Submit one of them with sbatch, see docs/cluster.md" >&2
        exit 1
    fi
done

# before `set -u`, which the scripts of modules and virtual environments do not always stand
# shellcheck source=slurm/site.sh
source "${OCC_SITE:-slurm/site.sh}" || exit
site_environment
set -euo pipefail

# WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from launch.sh
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
export PYTHONUNBUFFERED=1
echo "$(date '+%F %T') attempt $((${SLURM_RESTART_COUNT:-0} + 1)):" \
    "rank $RANK of $WORLD_SIZE on $(hostname)" >&2

# Slurm signals every process of a step, Python too: this one has to outlive it
trap : TERM USR1
status=0
"$PYTHON" -m megatron_occ "$@" || status=$?

# srun keeps the highest status of all ranks, and kills the others at the first that is not 0: what
# each rank ended with is left to launch.sh in a file of its own
if [[ -n ${OCC_ENDED:-} ]] && ((status)); then
    echo "$status" >"$OCC_ENDED/$RANK" || true
fi
# stopped as asked: no reason to kill the others, which are about to end as well
((status != 75)) || status=0
exit "$status"
