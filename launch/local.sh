#!/usr/bin/env bash
# One node:  launch/local.sh RECIPE [KEY=VALUE ...]      RANKS=8 launch/local.sh launch/recipes/world.yaml
# VERB=align stops before the baselines. The command starts `deepspeed` itself, divides the cores among the ranks if there
# is no GPU, takes a free port, and passes signals on to the ranks.
set -euo pipefail
exec python -m alignx_ds "${VERB:-run}" "$@" ${RANKS:+launch.ranks="$RANKS"}
