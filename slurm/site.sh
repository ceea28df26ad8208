# shellcheck shell=bash disable=SC2034
# What differs between clusters: the one file here to edit. submit.sh reads it before it submits, and every job when it begins.
# As it stands it works on a cluster where sbatch needs no options and `lsmoe` is found.

# Which machines. sbatch itself reads these (man sbatch, INPUT ENVIRONMENT VARIABLES), and they go before the #SBATCH lines of the
# scripts; before calling sbatch by hand: `source slurm/site.sh`. Nodes, ranks and cores are options of submit.sh and sbatch.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=4 # a rank for each: --ntasks-per-node=4

# How many seconds before the time limit a training is asked to save. It must finish a step and write a checkpoint in that time.
# export SBATCH_SIGNAL=B:USR1@120

# Where `lsmoe` comes from: modules, a virtual environment, or a container, which is put before the command.
# module load cuda/12.4
# source "$HOME/venv/bin/activate"
CONTAINER=() # such as (apptainer exec --nv --bind /scratch /images/lsmoe.sif)

# The network interface between nodes, if the wrong one is taken.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A folder on each node's own disk: a job keeps its caches and sockets below it, and removes them when it ends by itself. Run
# folders, data, recipes and logs lie on the file system that all nodes share; one rank writes what is shared.
NODE_LOCAL=${SLURM_TMPDIR:-/tmp}

# Further options of the srun, or the mpirun (with LAUNCH=mpirun), that starts the ranks.
SRUN_OPTIONS=() # such as (--cpu-bind=cores --mpi=pmix)
MPIRUN_OPTIONS=()
