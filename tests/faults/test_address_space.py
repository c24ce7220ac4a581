"""Ranks that may map less than the model has bytes: they share it under ZeRO-3, and are refused without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import Command
from processes import REPO, cpu_environment
from recording import Record
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alignx_ds.models.base import WORLD_BASES

LAYERS = 96
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
# glibc reserves an arena of 64 MB for each thread, and keeps large blocks that were freed.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
# With DeepSpeed's own numbers all of so small a model would stay gathered, and a bucket alone take 2 GB.
SIZES = {"stage3_max_live_parameters": 10**7, "stage3_max_reuse_distance": 10**7, "stage3_prefetch_bucket_size": 10**6}
SIZES |= {"reduce_bucket_size": 5 * 10**6}
# What rank 0 fits calibrators with is loaded later, and starts threads.
IMPORTED = """
import alignx_ds.pipeline, deepspeed, psutil, sklearn.cluster, sklearn.linear_model
sklearn.cluster.KMeans(2).fit([[0.0], [1.0]])
print(psutil.Process().memory_info().vms)
"""


def save_base(path: Path) -> int:
    """A random base model with the world's tokenizer; its bytes."""
    config = AutoConfig.from_pretrained(WORLD_BASES["world"], **SHAPE, head_dim=64, num_hidden_layers=LAYERS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, max_shard_size="32MB")
    AutoTokenizer.from_pretrained(WORLD_BASES["world"]).save_pretrained(path)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def libraries() -> int:
    """Bytes that a rank maps for its libraries."""
    command = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(command, cwd=REPO, env=cpu_environment(), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def settings(base: Path, zero3: Path) -> tuple[str, ...]:
    """Of a job with every step, as short as it can be."""
    return (
        *(f"model.path={base}", f"model.layers=[{LAYERS - 2}, {LAYERS - 1}]", "baselines.make=[]"),
        *(f"{stage}.deepspeed={zero3}" for stage in ("train", "align")),
        *(f"{stage}.{key}" for stage in ("train", "align") for key in ("steps=2", "warmup_steps=0", "batch=4")),
        *("align.ep_size=0", "data.train_rows=24", "data.held_out_rows=4", "experts.feature_rows=4"),
        *("gate.rows=8", "evaluation.batch=8"),
    )


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_ranks_that_cannot_hold_the_model_share_it(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    size, zero3 = save_base(tmp_path / "base"), tmp_path / "zero3.json"
    template = json.loads((REPO / "ds_configs/stage1_zero3.json").read_text())
    template["zero_optimization"] |= SIZES
    zero3.write_text(json.dumps(template))
    chosen = settings(tmp_path / "base", zero3)
    command = Command("run", tmp_path / "run", chosen, address_space=libraries() + size * 9 // 10)

    refused = command.start("align.deepspeed=ds_configs/stage2_moe_zero2.json")
    assert refused.codes == [2, 2], refused.console
    (line,) = [line for line in refused.console.splitlines() if line.startswith("alignx-ds: error:")]
    assert "align.deepspeed" in line and "the weights take 1.2 GiB, and a rank has room for " in line
    assert not command.output.exists(), "nothing was written"

    ended = command.start(timeout=2700)
    assert ended.well, ended.console
    report = json.loads((command.output / "report.json").read_text())
    assert {"base", "sequential", "mixed", "alignx"} <= report["systems"].keys()
    record(
        "memory",
        "ranks that may map 0.9 of the model's bytes beyond their libraries",
        "under ZeRO-3 the whole job ends well; without it one line, exit code 2",
    )
