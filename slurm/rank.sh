#!/bin/bash
# One process of a job: Slurm's names become torch's, then megatron-occ runs with the arguments.

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
exec "$PYTHON" -m megatron_occ "$@"
