#!/usr/bin/env bash
# Under MPI:  launch/mpi.sh RECIPE [KEY=VALUE ...]      RANKS=8 launch/mpi.sh launch/recipes/llama.yaml
# Ranks are read from Open MPI's variables; `python -m mpi4py` ends all ranks when one fails.
set -euo pipefail
exec mpirun -np "${RANKS:-2}" ${MPI_FLAGS:-} python -m mpi4py -m alignx_ds run "$@"
