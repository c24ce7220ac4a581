"""What the benchmarks share: model shapes, systems under test, interleaved timing, and records of results."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
