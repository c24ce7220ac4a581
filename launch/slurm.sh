#!/usr/bin/env bash
# Slurm, one task per GPU:  sbatch launch/slurm.sh RECIPE [KEY=VALUE ...]
# In an array job, %a stands for the task's number:  sbatch --array=0-2 launch/slurm.sh RECIPE seed=%a output=runs/seed-%a
#SBATCH --job-name=alignx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
stopped_after_a_checkpoint=75

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch

# Without a launcher in between, Slurm's signals reach every rank. `exec` leaves no shell in their way.
# shellcheck disable=SC2016 # the task's shell expands them, not this one
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  exec python -m alignx_ds "$@"' alignx "${VERB:-run}" "${@//%a/${SLURM_ARRAY_TASK_ID:-}}" &
step=$!

# Pass on a signal that only this shell receives (`scancel --batch`, --signal=B:...). SIGTERM is scancel: the job ends.
requeue=yes
trap 'kill -USR1 $step' USR1
trap 'requeue=no; kill -TERM $step' TERM
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?

if ((code == stopped_after_a_checkpoint)) && [[ $requeue == yes ]]; then
  echo "a checkpoint was written; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
