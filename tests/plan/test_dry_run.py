"""The dry run: it counts what the real models and rows have, and writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from alignx_ds import cli
from alignx_ds.config.parse import load
from alignx_ds.config.schema import RunConfig
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import freeze_trunk
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.dry_run import PARTS
from alignx_ds.plan.sizes import buffers, disk

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
pytestmark = pytest.mark.usefixtures("no_launcher")
GOOD = {"instruction": "reverse the words .", "input": "dog cat", "output": "cat dog"}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def alpaca(count: int) -> list[dict[str, str]]:
    return [GOOD | {"input": f"dog cat {n}"} for n in range(count)]


def dry_run(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert cli.main(["run", str(recipe), *overrides, "--dry-run"]) == 0
    return capsys.readouterr().out


def figure(printed: str, name: str) -> float:
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(name)]
    number, *_ = line.strip().removeprefix(name).split()
    return float(number.replace(",", ""))


def aligned_model(settings: RunConfig, base: BaseModel) -> AlignXForCausalLM:
    """The model that stage 2 would train, without its weights."""
    ranks = dict.fromkeys(PROJECTIONS, settings.experts.rank)
    shape = AlignXConfig(base.config, settings.expert_names, base.layers, ranks, settings.gate)
    model = AlignXForCausalLM(shape)
    freeze_trunk(model)
    return model


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_a_dry_run_counts_what_the_real_models_have(
    write_recipe: WriteRecipe, world_base: BaseModel, capsys: pytest.CaptureFixture[str], scope: str
) -> None:
    recipe = write_recipe(f"gate.scope={scope}", "experts.rank=8")
    printed = dry_run(recipe, capsys)
    base = AutoModelForCausalLM.from_pretrained(world_base.path)
    assert figure(printed, "base model") == base.num_parameters()
    chosen = [base.model.layers[layer].mlp for layer in (2, 3, 4)]
    assert figure(printed, "trained in stage 1") == sum(p.numel() for mlp in chosen for p in mlp.parameters())
    aligned = aligned_model(load(recipe), world_base)
    trained = {n: p.numel() for n, p in aligned.named_parameters() if p.requires_grad}
    factors = sum(count for name, count in trained.items() if ".mixture." in name)
    assert figure(printed, "experts' factors") == factors * 4 // 3  # stage 2 hosts the generalist's zeros too
    assert figure(printed, "gates and calibrations") == sum(trained.values()) - factors
    own = [b.numel() for n, b in aligned.named_buffers() if not n.startswith("backbone.model.rotary")]
    assert buffers(load(recipe), world_base) == sum(own)
    assert figure(printed, "full copies of the FFNs") == 3 * figure(printed, "trained in stage 1")


def test_a_dry_run_counts_the_rows(write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    printed = dry_run(write_recipe("data.train_rows=80", "data.held_out_rows=30", "axes.honest.rows=40"), capsys)
    words = [line.split() for line in printed.splitlines()]
    for axis, count in (("helpful", "80"), ("harmless", "80"), ("honest", "40")):
        assert [w[4] for w in words if w[:4] == [f"{axis},", "to", "train", "on"]] == [count]
        assert [w[3] for w in words if w[:3] == [f"{axis},", "held", "out"]] == ["30"]
    (line,) = [line for line in printed.splitlines() if line.startswith("  all axes, for stage 2")]
    trained, calibration_rows = map(int, re.findall(r"\b\d+\b", line.partition("stage 2")[2]))
    assert trained + calibration_rows == 3 * 80 + 40
    assert calibration_rows / (3 * 80 + 40) == pytest.approx(0.15, abs=0.1)


def test_a_training_row_whose_question_is_held_out_is_dropped_and_said(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.json", alpaca(60))
    held_out = write_rows(tmp_path / "held_out.json", [*alpaca(2), GOOD | {"input": "other words"}])
    sources = (f"axes.helpful.train={train}", f"axes.helpful.held_out={held_out}")
    printed = " ".join(dry_run(write_recipe(*sources), capsys).split())
    assert f"helpful, to train on 58 of 60 records -2 its question is held out, e.g. {train}, row 1" in printed
    assert "helpful, held out 3 of 3 records" in printed


def test_a_dry_run_prints_the_config_that_the_run_would_have_where_it_is_wanted(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe("seed=3")
    plan = dry_run(recipe, capsys, "train.lr=0.125")
    assert plan.startswith("plan of ") and "lr: " not in plan
    printed = dry_run(recipe, capsys, "train.lr=0.125", "--show-config")
    before, config = printed.split("\n\nconfig\n")
    assert plan.startswith(before)
    (tmp_path / "printed.yaml").write_text(config.split("\n\ndry run: ")[0])
    loaded = load(tmp_path / "printed.yaml")
    assert loaded == load(recipe, ["train.lr=0.125"])
    assert loaded.train.lr == 0.125


def test_a_dry_run_counts_the_steps(write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("train.steps=0", "train.epochs=2", "data.train_rows=80", "align.steps=7", "baselines.make=[h3fusion]")
    printed = dry_run(write_recipe(*changes), capsys)
    section = printed.split("optimizer steps\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[:-1] for line in section] == [
        *(["specialist", axis, "3", "with", "64", "rows"] for axis in ("helpful", "harmless", "honest")),
        ["stage", "2", "7", "with", "64", "rows"],
        ["h3fusion", "1", "with", "64", "rows"],
    ]


def test_the_table_has_a_line_for_each_stage_and_its_peaks_shrink_with_the_ranks(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe("experts.rank=0")  # full rank, so that there are experts to speak of

    def peaks(*overrides: str) -> dict[str, float]:
        table = dry_run(recipe, capsys, *overrides).split("memory per rank on")[1].split("\n\n")[0].splitlines()[1:]
        assert table[0].split() == ["MiB", *PARTS]
        rows = {line.split()[0]: line.split()[-1] for line in table if " (ZeRO-" in line}
        return {key: float(peak) for key, peak in rows.items()}

    alone, spread = peaks(), peaks("launch.ranks=4", "align.ep_size=4")
    assert list(alone) == list(spread) == ["train", "baselines.h3fusion", "baselines.trinityx", "align"]
    assert all(0 < spread[key] < alone[key] for key in alone)


def test_a_dry_run_says_that_all_experts_are_on_every_rank(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "1, with all experts on each in stage 2 (align.ep_size=0)" in dry_run(
        write_recipe("align.ep_size=0"), capsys
    )


def test_experts_that_are_not_trained_have_no_checkpoints(write_recipe: WriteRecipe, world_base: BaseModel) -> None:
    overrides = ("baselines.make=[]", "checkpoints.finished=true")
    kept, trained = (load(write_recipe(*overrides, f"align.expert_lr_scale={n}")) for n in (0, 0.1))
    assert sum(disk(kept, world_base).values()) < sum(disk(trained, world_base).values())


def test_a_fusion_that_is_not_made_takes_no_memory(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = dry_run(write_recipe("baselines.make=[ties]"), capsys)
    assert "h3fusion" not in printed and "full copies" not in printed


def test_a_dry_run_writes_nothing(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, snapshot: Snapshot
) -> None:
    recipe = write_recipe()
    before = snapshot(tmp_path)
    assert "nothing is written" in dry_run(recipe, capsys)
    assert snapshot(tmp_path) == before
