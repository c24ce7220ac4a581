"""What the benchmarks share: shapes, systems under test, interleaved timing, and records of what was seen."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
