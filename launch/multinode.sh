#!/usr/bin/env bash
# Several nodes over ssh:  launch/multinode.sh HOSTFILE RECIPE [KEY=VALUE ...]
# The hostfile has a line `host slots=8` per node. The project, its environment and the output directory have the same
# path on each. If a host has several interfaces, name the one that the hosts share: GLOO_SOCKET_IFNAME=eth0
# NCCL_SOCKET_IFNAME=eth0 launch/multinode.sh ...
set -euo pipefail
hostfile=$1
shift

# ssh starts with an empty environment, and the launcher passes on only the variables that a file names.
exports=$(mktemp)
trap 'rm -f "$exports"' EXIT
for name in $(compgen -e); do
  case $name in
    DS_ENV_FILE | *TOKEN*) ;; # the process list shows the variables that are passed on
    GLOO_* | NCCL_* | OMP_* | HF_* | DS_* | TORCH_* | TORCHDYNAMO_* | CUDA_HOME) echo "$name=${!name}" >>"$exports" ;;
  esac
done
for given in "${DS_ENV_FILE:-.deepspeed_env}" "$HOME/.deepspeed_env"; do
  if [[ -f $given ]]; then cat "$given" >>"$exports"; fi
done

DS_ENV_FILE=$exports deepspeed -q --no_local_rank --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
  ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --module alignx_ds "${VERB:-run}" "$@"
