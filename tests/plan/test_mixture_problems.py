"""What a base model whose FFNs are mixtures of experts can't be combined with: refused at once, before a run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import MIXTURES, base_model
from transformers import PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.errors import ConfigError
from alignx_ds.plan.checks import check

WriteRecipe = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("no_launcher")
TARGETS = "train.lora.targets=[q_proj, k_proj, v_proj, o_proj]"
RIGHT = {
    "train.trainable": "lora",
    "train.lora.targets": "[q_proj,k_proj,v_proj,o_proj]",
    "align.ep_size": "0",
    "baselines.make": "[task_arithmetic]",
}


@pytest.fixture(params=MIXTURES)
def recipe(
    request: pytest.FixtureRequest, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase, write_recipe: WriteRecipe
) -> Callable[..., Path]:
    """The world's recipe on a tiny model of each kind, with what such a model needs but for these changes."""
    model = tmp_path / "model"
    base_model(family=request.param, vocab_size=len(world_tokenizer)).save_pretrained(model)
    world_tokenizer.save_pretrained(model)
    chosen = (f"model.path={model}", "model.layers=[1,2]", "gate.latent=8", "gate.output_latent=8", "experts.rank=4")

    def write(**changed: str) -> Path:
        settings = RIGHT | {name.replace("__", "."): value for name, value in changed.items()}
        return write_recipe(*chosen, *(f"{name}={value}" for name, value in settings.items()))

    return write


def refusals(recipe: Path) -> dict[str, str]:
    try:
        check(parse.load(recipe), 1)
    except ConfigError as error:
        return {p.key: str(p) for p in error.problems}
    return {}


def test_what_it_needs_passes_and_is_planned(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert refusals(recipe()) == {}
    assert cli.main(["run", str(recipe()), "--dry-run"]) == 0
    assert "everything is checked" in capsys.readouterr().out


WRONG = [  # setting, value, key of the refusal, and its fix
    ("train.trainable", "ffn", "train.trainable", f"set train.trainable=lora and {TARGETS}"),
    ("train.trainable", "all", "train.trainable", f"set train.trainable=lora and {TARGETS}"),
    ("train.lora.targets", "[q_proj,up_proj]", "train.lora.targets", f"set {TARGETS}"),
    ("align.ep_size", "1", "align.ep_size", "set align.ep_size=0"),
    ("baselines.make", "[h3fusion]", "baselines.make", "leave out h3fusion"),
    ("baselines.make", "[restored,ties]", "baselines.make", "leave out restored"),
    ("gate.scope", "per_layer", "train.lora.targets", "set gate.scope=shared"),
    ("model.layers", "[1]", "model.layers", "name a layer below"),
]


def test_each_setting_that_needs_a_dense_ffn_is_refused_in_one_line(recipe: Callable[..., Path]) -> None:
    for setting, value, key, said in WRONG:
        found = refusals(recipe(**{setting.replace(".", "__"): value}))
        assert list(found) == [key], (setting, value, found)
        assert said in found[key] and "\n" not in found[key]


def test_the_world_s_settings_are_refused_all_at_once(recipe: Callable[..., Path]) -> None:
    found = refusals(recipe(train__trainable="ffn", align__ep_size="1", baselines__make="[h3fusion,trinityx]"))
    assert list(found) == ["train.trainable", "align.ep_size", "baselines.make"]
    assert all("for a mixture of experts (" in said for said in found.values())


ROUTER: dict[str, tuple[object, str]] = {
    "output_router_logits": (True, "set it to false in its config.json"),
    "router_jitter_noise": (0.1, "set it to 0.0 in its config.json"),
    "num_experts_per_tok": (5, "its config.json has 5 of 4; correct it"),
}


@pytest.mark.parametrize("name", ROUTER)
def test_a_router_that_learns_or_picks_more_than_there_are_is_refused(
    recipe: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    config = tmp_path / "model" / "config.json"
    value, said = ROUTER[name]
    written = json.loads(config.read_text())
    if name in written:  # only Mixtral has noise
        config.write_text(json.dumps(written | {name: value}))
        assert said in refusals(recipe())["model.path"]


def test_a_mixture_that_no_rank_holds_is_refused(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alignx_ds.runtime.memory.available", lambda ranks=None: 1000)
    assert cli.main(["run", str(recipe(launch__ranks="2")), "--dry-run"]) == 0
    assert "expected a mixture of experts that a rank can hold" in " ".join(capsys.readouterr().out.split())
