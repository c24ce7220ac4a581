#!/usr/bin/env bash
# Under MPI:  launch/mpi.sh RECIPE [KEY=VALUE ...]      RANKS=8 launch/mpi.sh launch/recipes/llama2-7b.yaml
# Ranks are read from Open MPI's variables; `python -m mpi4py` ends all ranks when one fails.
# MPI_FLAGS is passed to mpirun, e.g. "--hostfile hosts -x MASTER_ADDR=node1", or "--allow-run-as-root" in a container.
set -euo pipefail
read -ra flags <<<"${MPI_FLAGS:-}"
exec mpirun -np "${RANKS:-2}" "${flags[@]}" python -m mpi4py -m alignx_ds "${VERB:-run}" "$@"
