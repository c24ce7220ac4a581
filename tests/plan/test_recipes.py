"""The shipped recipes: dry runs of all of them, without weights and without the hub, and the authors' settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.data.world.files import write_files
from alignx_ds.models.base import BaseModel
from alignx_ds.training.engine import steps_of

pytestmark = pytest.mark.usefixtures("no_launcher")

PARAMETERS = {
    "llama2-7b": "6,738,415,616",
    "mistral-7b": "7,241,732,096",
    "gemma-7b": "8,537,680,896",
    "deepseek-llm-7b": "6,910,365,696",
    "llama2-70b": "68,976,648,192",
}
RECIPES = Path(__file__).resolve().parents[2] / "launch/recipes"


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_large_recipe_has_the_authors_settings(name: str) -> None:
    c = parse.load(RECIPES / f"{name}.yaml")
    assert (c.train.lr, c.train.batch, c.train.weight_decay, c.train.epochs) == (2e-5, 64, 0.01, 3.0)
    assert (c.gate.latent, c.gate.temperature, c.gate.fractal, c.gate.natural) == (256, 1.0, 0.6, 0.4)
    assert (c.gate.granularity, c.gate.lexical, c.experts.rank) == (0.05, 0.0, 64)
    assert steps_of(c.train, 20_000) == 938, "of the helpful axis: 3 epochs of 20k rows in batches of 64"
    assert c.output == f"runs/{name}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_large_recipe_is_checked_without_weights_or_hub(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape is shipped, so parameters and memory are known; what only the hub could tell is named.

    Every stage fits the GPUs that the recipe is for.
    """
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", str(RECIPES / f"{name}.yaml"), "--dry-run", "--gpu-memory", "80GiB"]) == 0
    shown = capsys.readouterr().out
    assert PARAMETERS[name] in shown
    unchecked = shown.split("\n\nnot checked\n")[1]
    assert "  tatsu-lab/alpaca: the hub can't be reached" in unchecked
    assert "everything is checked" not in shown
    assert not list(tmp_path.iterdir())


def test_a_7b_recipe_is_checked_whole_on_local_stand_ins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, world_base: BaseModel
) -> None:
    """A model directory without weights, and files in the published schemas."""
    model = tmp_path / "model"
    shutil.copytree(world_base.path, model, ignore=shutil.ignore_patterns("*.safetensors"))
    write_files(tmp_path / "rows", 90, seed=0)
    rows = {path.stem: path for path in (tmp_path / "rows").iterdir()}
    changes = [
        f"model.path={model}",
        "gate.latent=64",
        f"axes.helpful.train={rows['alpaca_train']}",
        f"axes.helpful.held_out={rows['alpaca_held_out']}",
        "axes.helpful.held_out_schema=",
        f"axes.harmless.train={rows['beavertails_train']}",
        f"axes.harmless.held_out={rows['beavertails_held_out']}",
        f"axes.honest.train={rows['truthfulqa_train']}",
        f"evaluation.sets.xstest.source={rows['plain_held_out']}",
        "evaluation.sets.xstest.schema=plain",
        f"evaluation.sets.truthfulqa_mc.source={rows['truthfulqa_held_out']}",
        "evaluation.sets.truthfulqa_mc.schema=truthfulqa",
    ]
    assert cli.main(["run", str(RECIPES / "llama2-7b.yaml"), "--dry-run", *changes]) == 0
    said = capsys.readouterr().out
    not_checked = said.split("not checked\n")[1].split("\n\n")[0].splitlines()
    assert not_checked == [f"  {model}: names and shapes of the weights, which are not there"]
    assert "dry run: everything else is checked, nothing is written" in said
    assert cli.main(["run", str(RECIPES / "llama2-7b.yaml"), *changes]) == 2, "a real run asks for the weights"
    assert "a model with safetensors weights" in capsys.readouterr().err


def test_the_small_real_recipe_needs_its_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNX_DATA", str(tmp_path / "nowhere"))
    assert cli.main(["run", str(RECIPES / "small-real.yaml"), "--dry-run"]) == 2
    complaints = capsys.readouterr().err
    assert "axes.honest.train" in complaints and "judges.classifier_rows" in complaints
    assert "Traceback" not in complaints


def test_a_preview_needs_the_tokenizer_and_no_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, world_base: BaseModel
) -> None:
    assert cli.main(["data", "preview", str(RECIPES / "llama2-7b.yaml")]) == 2
    assert "meta-llama/Llama-2-7b-hf: the hub can't be reached for its tokenizer" in capsys.readouterr().err
    model = tmp_path / "model"
    shutil.copytree(world_base.path, model, ignore=shutil.ignore_patterns("*.safetensors"))
    changes = ["data.train_rows=60", "data.held_out_rows=20", f"model.path={model}"]
    assert cli.main(["data", "preview", str(RECIPES / "world.yaml"), *changes, "--rows", "1"]) == 0
    assert "tokens masked" in capsys.readouterr().out
