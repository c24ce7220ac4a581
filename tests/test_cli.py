"""The command line in process: bad input costs one line per problem, exit code 2, and nothing on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from alignx_ds import cli
from alignx_ds.config.parse import load
from alignx_ds.config.schema import RunConfig
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import freeze_trunk
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import outputs

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
Refused = Callable[..., list[str]]
PREFIX = "alignx-ds: error: "
pytestmark = pytest.mark.usefixtures("no_launcher")
GOOD = {"instruction": "reverse the words .", "input": "dog cat", "output": "cat dog"}


@pytest.fixture
def refused(
    tmp_path: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs a command that must be refused, without --dry-run unless it is given; returns its problems."""

    def refuse(*arguments: str | Path) -> list[str]:
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        code = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert snapshot(tmp_path) == before, "nothing is written or overwritten"
        lines = printed.err.splitlines()
        assert lines
        assert all(line.startswith(PREFIX) for line in lines), "one line per problem, and no traceback"
        return [line.removeprefix(PREFIX) for line in lines]

    return refuse


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def alpaca(count: int) -> list[dict[str, str]]:
    return [GOOD | {"input": f"dog cat {n}"} for n in range(count)]


@pytest.mark.parametrize("verb", ["run", "specialists", "align"])
def test_several_problems_are_reported_at_once(refused: Refused, write_recipe: WriteRecipe, verb: str) -> None:
    wrong = ("align.ep_size=3", "axes.helpful.train=nowhere.json", "align.deepspeed=ds_configs/stage1_zero3.json")
    found = refused(verb, write_recipe(*wrong))
    assert {line.split(":")[0] for line in found} == {key.split("=")[0] for key in wrong}
    assert any("align.ep_size: got 3" in line and "choose one of 1, 2, 4" in line for line in found)
    assert any("axes.helpful.train: got 'nowhere.json'" in line for line in found)
    assert any("align.deepspeed" in line and "ZeRO stage 3" in line for line in found)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([GOOD, {"instruction": "a", "input": ""}], ["row 2", "'output'"]),
        ([GOOD | {"output": " "}] * 3, ["(helpful)", "no usable row to train on of 3 records (3 × empty output)"]),
        ([GOOD, GOOD | {"input": 3}], ["row 2", "'input'", "int"]),
        ([GOOD, ["a", "b"]], ["row 2", "list"]),
        ([], ["no usable row"]),
        ([GOOD | {"instruction": "a lone surrogate \ud800", "input": str(n)} for n in range(40)], ["row 1"]),
        ([GOOD | {"input": "word " * 200}], ["all 1 rows are longer than model.max_length=96"]),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    refused: Refused, write_recipe: WriteRecipe, tmp_path: Path, rows: list[Any], named: list[str]
) -> None:
    path = write_rows(tmp_path / "rows.json", rows)
    (line,) = refused("run", write_recipe(f"axes.helpful.train={path}"))
    for part in (str(path), *named):
        assert part in line


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_a_split_that_leaves_no_row_on_one_side_is_refused(
    refused: Refused, write_recipe: WriteRecipe, share: float
) -> None:
    (line,) = refused("run", write_recipe(f"data.calibration_share={share}"), "--dry-run")
    assert "no row is left" in line


def test_another_runs_directory_is_left_alone(refused: Refused, write_recipe: WriteRecipe) -> None:
    outputs.claim(load(write_recipe("seed=9")))
    (line,) = refused("run", write_recipe())
    assert "output" in line
    assert "another seed" in line


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_a_directory_with_foreign_files_is_left_alone(
    refused: Refused, write_recipe: WriteRecipe, tmp_path: Path, name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("years of work")
    (line,) = refused("run", write_recipe())
    assert str(tmp_path / "run") in line


def test_foreign_files_where_specialists_would_go_are_left_alone(
    refused: Refused, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "mine/helpful").mkdir(parents=True)
    (tmp_path / "mine/helpful/thesis.tex").write_text("years of work")
    (line,) = refused("run", write_recipe(f"specialists={tmp_path / 'mine'}"), "--dry-run")
    assert "specialists" in line


def test_other_verbs_say_what_is_wrong_too(refused: Refused, tmp_path: Path, repo_root: Path) -> None:
    assert "no aligned model" in refused("generate", tmp_path, "hello")[0]
    assert "no aligned model" in refused("generate", repo_root / "alignx_ds/models/assets/world-base", "hello")[0]


@pytest.mark.parametrize(("target", "rows"), [("rows", "0"), ("rows", "-1"), ("a file", "3")])
def test_the_worlds_rows_need_a_directory_and_a_number(
    refused: Refused, tmp_path: Path, target: str, rows: str
) -> None:
    (tmp_path / "a file").write_text("mine")
    refused("world", tmp_path / target, "--rows", rows)


def test_the_worlds_rows_are_written_once(refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["world", str(tmp_path / "rows"), "--rows", "5"]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(p) for p in (tmp_path / "rows").iterdir())
    assert "exists already" in refused("world", tmp_path / "rows", "--rows", "5")[0]


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["run"], ["run", "r.yaml", "--fast"], ["world"], ["generate", "m"]]
)
def test_a_malformed_command_shows_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: alignx-ds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb", ["run", "specialists", "align", "data", "answer", "judge", "generate", "explain", "world"]
)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: alignx-ds {verb}" in capsys.readouterr().out


def test_options_may_stand_between_overrides() -> None:
    args = cli.parse(["run", "r.yaml", "a=1", "--dry-run", "b=2"])
    assert (args.overrides, args.dry_run) == (["a=1", "b=2"], True)
    args = cli.parse(["explain", "runs/world", "one", "--json", "two"])
    assert (args.prompts, args.json) == (["one", "two"], True)


def dry_run(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert cli.main(["run", str(recipe), *overrides, "--dry-run"]) == 0
    return capsys.readouterr().out


def figure(printed: str, name: str) -> float:
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(name)]
    return float(line.strip().removeprefix(name).split()[0].replace(",", ""))


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
    trained = {n: p.numel() for n, p in aligned_model(load(recipe), world_base).named_parameters() if p.requires_grad}
    factors = sum(count for name, count in trained.items() if ".mixture." in name)
    assert figure(printed, "experts' factors") == factors * 4 // 3  # stage 2 hosts the generalist's zeros too
    assert figure(printed, "gates and calibrations") == sum(trained.values()) - factors
    assert figure(printed, "full copies of the FFNs") == 3 * figure(printed, "trained in stage 1")


def test_a_dry_run_counts_the_rows(write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    printed = dry_run(write_recipe("data.train_rows=80", "data.held_out_rows=30", "axes.honest.rows=40"), capsys)
    words = [line.split() for line in printed.splitlines()]
    for axis, count in (("helpful", "80"), ("harmless", "80"), ("honest", "40")):
        assert [w[4] for w in words if w[:4] == [f"{axis},", "to", "train", "on"]] == [count]
        assert [w[3] for w in words if w[:3] == [f"{axis},", "held", "out"]] == ["30"]
    (line,) = [line for line in printed.splitlines() if line.startswith("  all, for stage 2")]
    trained, calibration_rows = (int(word) for word in line.split()[4:] if word.isdigit())
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


def test_a_dry_run_prints_the_config_that_the_run_would_have(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe("seed=3")
    printed = dry_run(recipe, capsys, "train.lr=0.125")
    settings = printed.split("\n\nparameters\n")[0]
    (tmp_path / "printed.yaml").write_text(settings)
    assert load(tmp_path / "printed.yaml") == load(recipe, ["train.lr=0.125"])
    assert OmegaConf.create(settings).train.lr == 0.125


def test_the_memory_estimate_shrinks_with_the_ranks(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe("experts.rank=0")  # full rank, so that there are experts to speak of
    alone, spread = (dry_run(recipe, capsys, *o) for o in ((), ("launch.ranks=4", "align.ep_size=4")))
    for stage in ("stage 1 (ZeRO-3)", "stage 2 (ZeRO-2)", "H3Fusion, TrinityX (ZeRO-2)"):
        assert 0 < figure(spread, stage) < figure(alone, stage)


def test_a_fusion_that_is_not_made_takes_no_memory(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = dry_run(write_recipe("baselines.make=[ties]"), capsys)
    assert "H3Fusion" not in printed and "full copies" not in printed


def test_a_dry_run_writes_nothing(
    write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, snapshot: Snapshot
) -> None:
    recipe = write_recipe()
    before = snapshot(tmp_path)
    assert "nothing written" in dry_run(recipe, capsys)
    assert snapshot(tmp_path) == before
