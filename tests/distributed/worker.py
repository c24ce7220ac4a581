"""What every rank runs: `worker.py OUT JOB…`. Each job leaves OUT/JOB.RANK.WORLD.pt behind."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

gc.disable()  # imports make no garbage, and the search for it takes a second


def main(directory: Path, names: list[str]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed's launcher sets it anew
    sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests share
    from alignx_ds.config.schema import LaunchConfig
    from alignx_ds.runtime import distributed, memory

    distributed.init_process_group(LaunchConfig.timeout)
    import torch
    from jobs import JOBS

    gc.enable()
    memory.keep()  # as in a run, which has imported everything when its process group starts
    rank, world = distributed.rank(), distributed.world_size()
    for name in names:
        partial = directory / f"{name}.{rank}.{world}.partial"
        torch.save(JOBS[name](directory), partial)
        partial.rename(partial.with_suffix(".pt"))
    distributed.barrier()
    distributed.shutdown()
    distributed.exit_rank(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
