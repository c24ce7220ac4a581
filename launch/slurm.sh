#!/usr/bin/env bash
# Slurm:  sbatch launch/slurm.sh RECIPE [KEY=VALUE ...]
#SBATCH --job-name=alignx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
set -euo pipefail
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_PER_NODE:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "$master:29500" --rdzv_id "$SLURM_JOB_ID" -m alignx_ds run "$@"
