#!/usr/bin/env bash
# Several nodes over ssh:  launch/multinode.sh HOSTFILE RECIPE [KEY=VALUE ...]
# The hostfile has a line `host slots=8` per node; the project and its environment lie at the same path on each.
set -euo pipefail
hostfile=$1
shift
exec deepspeed -q --no_local_rank --hostfile "$hostfile" --module alignx_ds run "$@"
