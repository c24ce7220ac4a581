#!/usr/bin/env bash
# One node:  launch/local.sh RECIPE [KEY=VALUE ...]      RANKS=8 launch/local.sh launch/recipes/world.yaml
# Without a GPU each rank gets its share of the cores.
set -euo pipefail
ranks=${RANKS:-2}
if ! command -v nvidia-smi >/dev/null; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
fi
exec deepspeed -q --no_local_rank --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" --module alignx_ds run "$@"
