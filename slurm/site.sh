# Settings of your cluster: the one file to edit.
#
# It is read twice. You `source slurm/site.sh` before sbatch, because #SBATCH lines can't come from a
# file: sbatch takes the SBATCH_* names from the environment instead (a command-line option wins).
# Then the job reads it, on every node. Another file: export OCC_SITE=path. slurm/convert.sbatch wants
# no GPUs: do not source it before that one.
# shellcheck shell=bash disable=SC2034

# ---- what to ask for -----------------------------------------------------------------------------
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
export SBATCH_TIMELIMIT=24:00:00  # a run that needs longer is requeued and goes on
export SBATCH_EXCLUSIVE=exclusive # whole nodes, all their CPUs
export SBATCH_MEM_PER_NODE=0      # and all their memory
export SBATCH_GPUS_PER_NODE=8     # delete this line where nodes have no GPUs; processes: see launch.sh

# ---- Python --------------------------------------------------------------------------------------
PYTHON=.venv/bin/python # as seen from the folder you submit in

# Further options of srun. In a container (pyxis here) the checkout, the data and run_dir need the
# same paths as outside.
SRUN_OPTIONS=()
# SRUN_OPTIONS=(--container-image=image.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# The command of rollout servers (slurm/rl_servers.sbatch), and options of srun for them: vLLM may be in
# an environment or image of its own.
VLLM=vllm
SERVER_SRUN_OPTIONS=("${SRUN_OPTIONS[@]}")

# Called in every process before Python starts, inside the container.
site_environment() {
    # module load cuda nccl
    # The network between nodes, where the libraries pick a wrong one (`ip address` lists them):
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
    export NCCL_DEBUG=WARN
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
}

# ---- rendezvous ----------------------------------------------------------------------------------
# Ports for MASTER_PORT, one for each job id: free on all nodes, below those Linux hands out (32768).
FIRST_PORT=20000
NUMBER_OF_PORTS=10000

# ---- health check --------------------------------------------------------------------------------
# Of each node, before a job starts and after it failed (slurm/health.py): disks, memory, GPUs. A node
# that fails it, or does not answer in time, is left out of the next attempt. 0 seconds: no check.
HEALTH_SECONDS=300
HEALTH_FREE_MEMORY=50     # percent of the node's memory that must be free
HEALTH_FREE_GPU_MEMORY=90 # and of each GPU's
