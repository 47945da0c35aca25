#!/bin/bash
# Checks one node before a job starts on it: environment of slurm/site.sh, then slurm/health.py with the
# arguments. Called by launch.sh, a step on each node.

# shellcheck source=slurm/site.sh
source "${OCC_SITE:-slurm/site.sh}" || exit
site_environment
set -euo pipefail
exec "$PYTHON" slurm/health.py "$@"
