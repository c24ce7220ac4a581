#!/usr/bin/env bash
# Several nodes over ssh:  launch/multinode.sh HOSTFILE RECIPE [KEY=VALUE ...]
# The hostfile has a line `host slots=8` per node; the project, its environment and the output directory lie at the
# same path on each. Where a host has several interfaces, name the one that they share: GLOO_SOCKET_IFNAME=eth0
# NCCL_SOCKET_IFNAME=eth0 launch/multinode.sh ...
set -euo pipefail
hostfile=$1
shift

# ssh starts with a bare environment, and the launcher hands on only what a file names.
exports=$(mktemp)
trap 'rm -f "$exports"' EXIT
for name in $(compgen -e); do
  case $name in
    DS_ENV_FILE | *TOKEN*) ;; # what is handed on can be read in the process list
    GLOO_* | NCCL_* | OMP_* | HF_* | DS_* | TORCH_* | TORCHDYNAMO_* | CUDA_HOME) echo "$name=${!name}" >>"$exports" ;;
  esac
done
for given in "${DS_ENV_FILE:-.deepspeed_env}" "$HOME/.deepspeed_env"; do
  if [[ -f $given ]]; then cat "$given" >>"$exports"; fi
done

DS_ENV_FILE=$exports deepspeed -q --no_local_rank --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
  ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --module alignx_ds "${VERB:-run}" "$@"
