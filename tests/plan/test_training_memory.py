"""The memory estimate: what a real engine holds is what it counts, and `--gpu-memory` says what would fit."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import gpu_memory
from alignx_ds.plan.arguments import memory_size
from alignx_ds.plan.memory import Lengths, memory, stage_memory
from alignx_ds.plan.model import base_model
from alignx_ds.plan.sizes import disk
from alignx_ds.plan.zero import Held, Model, Zero

ROOT = Path(__file__).resolve().parents[2]
RECIPES, DOCS = ROOT / "launch/recipes", ROOT / "docs"
GIB = 2**30
WriteRecipe = Callable[..., Path]


def holds(stage: int, ranks: int, *, on_gpu: bool = True, accumulates: bool = False, **settings: Any) -> Held:
    """Of a model of 1,000 frozen numbers and 600 trained ones in bf16, the largest of which has 100."""
    zero = Zero(stage, 2, ranks, accumulates, True, on_gpu, {"reduce_bucket_size": 200, **settings})
    return zero.holds(Model(1000, ((600, ranks),), 100))


def test_zero_shards_what_its_stage_says() -> None:
    one, two, three = (holds(stage, 4) for stage in (1, 2, 3))
    assert [h.parameters for h in (one, two, three)] == [3200, 3200, 800]
    assert [h.optimizer for h in (one, two, three)] == [150 * 12] * 3, "fp32 weights and two states"
    assert one.gradients == 1200
    assert two.gradients == 2 * (150 + 100), "a parameter on two partitions is whole in both"
    assert three.gradients == 300
    assert holds(2, 4, accumulates=True).held == 500 and two.held == 0


def test_frozen_weights_have_no_fp32_copies() -> None:
    zero = Zero(2, 2, 1, False, True, True, {})
    assert zero.holds(Model(1000, ((600, 1),), 100)).optimizer == zero.holds(Model(0, ((600, 1),), 100)).optimizer


def test_buckets_and_gathered_parameters_are_as_large_as_the_json_says() -> None:
    assert holds(2, 4).bucket == 400 and holds(2, 4, overlap_comm=True).bucket == 800
    assert holds(2, 4, reduce_bucket_size=5000).bucket == 10_000, "reserved"
    assert holds(2, 4, reduce_bucket_size=5000, on_gpu=False).bucket == 1200, "written"
    assert holds(2, 4, contiguous_gradients=False).bucket == 0
    near = holds(3, 4, stage3_max_live_parameters=200, stage3_prefetch_bucket_size=50)
    assert near.gathered == 2 * (200 + 50 + 100)
    again = Model(1000, ((600, 4),), 100, reused=700)
    few = {"stage3_max_live_parameters": 200, "stage3_prefetch_bucket_size": 50}
    zero = Zero(3, 2, 4, False, True, True, few)
    assert zero.holds(again).gathered == 2 * 700, "what the backward pass uses again soon stays"
    zero = Zero(3, 2, 4, False, True, True, {**few, "stage3_max_reuse_distance": 1000})
    assert zero.holds(again).gathered == 2 * (1000 / 2 + 50 + 100)
    assert holds(3, 4).gathered == 3200, "by default all of so small a model stays gathered"
    assert holds(3, 1).gathered == holds(2, 4).gathered == 0


def test_what_is_offloaded_is_in_ram() -> None:
    cpu = {"device": "cpu"}
    plain = holds(3, 4)
    moved = holds(3, 4, offload_optimizer=cpu, offload_param=cpu)
    assert moved.parameters == moved.optimizer == moved.gradients == 0
    assert moved.in_ram >= plain.parameters + plain.optimizer + plain.gradients


def llama(*overrides: str) -> tuple[RunConfig, BaseModel]:
    config = parse.load(RECIPES / "llama2-7b.yaml", list(overrides))
    return config, base_model(config, weights=False)


def test_fewer_tokens_and_recomputing_lower_the_peak() -> None:
    config, base = llama("train.checkpoint_activations=false")
    rows = [Lengths(512, 256)] * 64
    long, short = (stage_memory(config, base, "train", r, 8, on_gpu=True) for r in ((), rows))
    assert short.kept < long.kept / 3 and short.logits < long.logits and short.peak < long.peak / 2
    config.train.checkpoint_activations = "true"
    again = stage_memory(config, base, "train", (), 8, on_gpu=True)
    assert again.peak < long.peak / 2 and again.instead == long.kept


@pytest.mark.parametrize(("room", "stages"), [(80, []), (22, ["align"]), (12, ["train", "align"])])
def test_a_stage_that_is_too_large_is_told_what_makes_it_fit(room: int, stages: list[str]) -> None:
    config, base = llama()
    found = list(gpu_memory.problems(config, base, {}, 8, room * GIB))
    assert [p.key.split(",")[0] for p in found] == stages
    for problem in found:
        settings, _, takes = problem.fix.partition(" makes it ")
        assert float(takes.split()[0]) <= room * (1 - gpu_memory.FREE)
        changed, _ = llama(*settings.split())
        key = problem.key.split(",")[0]
        ranks = changed.launch.ranks
        assert memory(changed, base, {}, ranks, on_gpu=True)[key].peak <= room * GIB * (1 - gpu_memory.FREE)


def test_a_stage_that_the_run_does_not_come_to_may_be_too_large() -> None:
    config, base = llama()
    keys = {
        until: [p.key.split(",")[0] for p in gpu_memory.problems(config, base, {}, 8, 12 * GIB, until)]
        for until in ("specialists", "align", "run")
    }
    assert keys == {"specialists": ["train"], "align": ["train", "align"], "run": ["train", "align"]}


def test_lora_s_optimizer_takes_a_tenth_of_ffn_s_or_less() -> None:
    """The trunk has no gradients, fp32 weights or optimizer states: only the factors do."""
    held = {}
    for trained in ("ffn", "lora"):
        config, base = llama(f"train.trainable={trained}")  # of rank 64
        held[trained] = stage_memory(config, base, "train", (), 8, on_gpu=True).zero
    factors = 16 * 3 * 64 * (4096 + 11008)
    assert held["lora"].optimizer == pytest.approx(12 * factors / 8)
    assert held["lora"].optimizer <= 0.1 * held["ffn"].optimizer
    assert held["lora"].gradients <= 0.1 * held["ffn"].gradients
    assert held["lora"].parameters == pytest.approx(held["ffn"].parameters + 2 * factors / 8)


def test_all_weights_have_gradients_states_and_activations() -> None:
    (config, base), (ffn, _) = llama("train.trainable=all"), llama()
    whole = sum(p.numel() for p in base.skeleton.parameters())
    held, of_ffn = (stage_memory(c, base, "train", (), 8, on_gpu=True) for c in (config, ffn))
    assert held.zero.optimizer == pytest.approx(12 * whole / 8) and held.zero.gradients == pytest.approx(2 * whole / 8)
    assert held.zero.parameters == of_ffn.zero.parameters, "all are there, trained or not"
    assert held.kept > 1.9 * of_ffn.kept, "the layers below the AlignX layers are trained too"
    taken, of_ffns = sum(disk(config, base).values()), sum(disk(ffn, base).values())
    assert taken > 1.5 * of_ffns


def test_llama2_7b_s_lora_fits_a_gpu_of_24_gib_as_the_docs_say() -> None:
    (line,) = [line for line in (DOCS / "recipes.md").read_text().splitlines() if "--gpu-memory 24GiB" in line]
    settings = [word for word in line.split("`")[1].split() if "=" in word]
    assert {"train.trainable=lora", "launch.ranks=1"} <= set(settings)
    config, base = llama(*settings)
    assert list(gpu_memory.problems(config, base, {}, 1, 24 * GIB)) == []
    config.train.trainable = "ffn"
    assert [p.key for p in gpu_memory.problems(config, base, {}, 1, 24 * GIB)] == ["train, peak of a rank"]


def test_what_is_named_is_needed() -> None:
    config, base = llama("align.checkpoint_activations=false")
    stage = gpu_memory.Fitted(config, base, "align", (), 8, 14 * GIB)
    change = stage.change()
    assert stage.peak(change) <= stage.room
    for name in change.keys() - {"align.ep_size", "align.deepspeed"}:
        assert stage.peak({n: v for n, v in change.items() if n != name}) > stage.room, name


def test_nothing_is_promised_where_nothing_helps() -> None:
    config, base = llama()
    (_, problem) = gpu_memory.problems(config, base, {}, 8, GIB)
    assert "shorten model.max_length" in problem.fix


@pytest.mark.usefixtures("no_launcher")
def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe("baselines.make=[]")
    for more in ([], ["--dry-run"]):
        assert cli.main(["run", str(recipe), "--gpu-memory", "1GiB", *more]) == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 2 and all("expected at most 0.9 GiB of 1.0 GiB" in line for line in lines)
        assert ("memory per rank on 1 ranks" in printed.out) == bool(more)
    assert not (tmp_path / "run").exists()
    assert cli.main(["run", str(recipe), "--gpu-memory", "80GiB", "--dry-run"]) == 0


def test_sizes_have_a_unit() -> None:
    assert memory_size("80GiB") == 80 * GIB and memory_size("1.5 GB") == 1.5e9
    for text in ("80", "GiB", "0GiB", "-1GiB", "80gib", "nanGiB"):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            memory_size(text)
