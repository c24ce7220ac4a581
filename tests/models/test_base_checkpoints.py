"""Checkpoints as users bring them: whole ones of every family pass, broken ones are refused before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, MIXTURES, base_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import ModelConfig
from alignx_ds.errors import ConfigError
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.checks import check

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TINY = ("model.layers=[1, 2]", "gate.latent=8", "gate.output_latent=8")
WriteRecipe = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, world_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny base model whose head is not tied, with the world's tokenizer."""
    directory = tmp_path_factory.mktemp("whole")
    base_model(vocab_size=len(world_tokenizer)).save_pretrained(directory)
    world_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    """Set these keys of a JSON file; remove those that are None."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def reweigh(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    changed = {name: t.clone() for name, t in change(load_file(directory / WEIGHTS)).items()}
    save_file(changed, directory / WEIGHTS, metadata={"format": "pt"})


def shard(directory: Path) -> None:
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="40KB")
    (directory / WEIGHTS).unlink(missing_ok=True)
    assert (directory / INDEX).is_file()


def problem_of(directory: Path) -> str:
    """What the headers say; empty where nothing is wrong."""
    try:
        found = BaseModel(ModelConfig(path=str(directory))).checkpoint_problem()
    except ConfigError as error:
        return str(error)
    return str(found or "")


# --- whole ones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path: Path, family: str, tied: bool) -> None:
    base_model(family=family, tied=tied).save_pretrained(tmp_path)
    assert problem_of(tmp_path) == ""


def bare(directory: Path) -> None:
    """As LlamaModel saves itself: without the prefix, and without a head, which is tied."""
    edit(directory / "config.json", tie_word_embeddings=True)
    reweigh(directory, lambda w: {k.removeprefix("model."): v for k, v in w.items() if "lm_head" not in k})


def head_alone(directory: Path) -> None:
    """Of two tied tensors, the head is the stored one."""
    edit(directory / "config.json", tie_word_embeddings=True)
    reweigh(directory, lambda w: {k: v for k, v in w.items() if "embed_tokens" not in k})


def both_tied(directory: Path) -> None:
    edit(directory / "config.json", tie_word_embeddings=True)
    reweigh(directory, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]})


def mixed_types(directory: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    reweigh(directory, lambda w: {k: v.to(kinds[i % 3]) for i, (k, v) in enumerate(w.items())})


def old_buffers(directory: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reweigh(directory, lambda w: w | {name: torch.ones(4)})


def index_beside(directory: Path) -> None:
    """A leftover index of shards that are gone: transformers reads the single file."""
    (directory / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))


WHOLE = (shard, bare, head_alone, both_tied, mixed_types, old_buffers, index_beside)


@pytest.mark.parametrize("change", WHOLE, ids=lambda change: change.__name__)
def test_what_transformers_loads_whole_passes(model: Path, change: Callable[[Path], None]) -> None:
    change(model)
    assert problem_of(model) == ""
    loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights, base = loaded.state_dict(), BaseModel(ModelConfig(path=str(model)))
    for projection in ("gate", "up", "down"):
        name = base.table.weight_name(1, projection)
        assert torch.equal(base.weight(1, projection), weights[name])


# --- broken ones --------------------------------------------------------------------------------------------------


def without(*parts: str) -> Callable[[Path], None]:
    return lambda d: reweigh(d, lambda w: {k: v for k, v in w.items() if not any(p in k for p in parts)})


def renamed(prefix: str) -> Callable[[Path], None]:
    return lambda d: reweigh(d, lambda w: {prefix + k: v for k, v in w.items()})


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda d: reweigh(d, lambda w: {k: change(v) if part in k else v for k, v in w.items()})


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda d: edit(d / "config.json", **values)


def without_a_shard(directory: Path) -> None:
    shard(directory)
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def cut_short(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-100])


def empty_file(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"")


def pointer(directory: Path) -> None:
    (directory / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 3618688\n")


def untied_values(directory: Path) -> None:
    edit(directory / "config.json", tie_word_embeddings=True)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no head": (without("lm_head"), "it lacks lm_head.weight; its head would be random"),
    "no embedding": (without("embed_tokens"), "it lacks model.embed_tokens.weight; they would be random"),
    "a layer missing": (without("layers.2."), "it lacks model.layers.2."),
    "tied, but neither is there": (
        lambda d: (without("lm_head", "embed")(d), untied_values(d))[0],
        "it lacks model.embed_tokens.weight",
    ),
    "tied, but stored with other values": (untied_values, "are tied by its config.json, but are stored with different"),
    "compiled": (renamed("_orig_mod."), "begin with '_orig_mod.': it was saved from a compiled model"),
    "wrapped": (renamed("module."), "begin with 'module.'"),
    "a part of another": (renamed("language_model."), "begin with 'language_model.'"),
    "not gathered": (changed(".mlp.", lambda t: torch.empty(0)), "hold no values: the shards of ZeRO-3"),
    "another size": (changed("1.mlp.up_proj", lambda t: t[:-1]), "up_proj.weight is [47, 32], not [48, 32]"),
    "another vocabulary": (settings(vocab_size=700), "lm_head.weight is [647, 32], not [700, 32]"),
    "fewer layers": (settings(num_hidden_layers=2), "it holds model.layers.2.input_layernorm.weight"),
    "more layers": (settings(num_hidden_layers=4), "it lacks model.layers.3."),
    "a bias without a place": (
        lambda d: reweigh(d, lambda w: w | {"model.layers.0.mlp.up_proj.bias": torch.ones(48)}),
        "model.layers.0.mlp.up_proj.bias, which its config.json has no place for",
    ),
    "another architecture": (settings(model_type="qwen3"), "q_norm"),
    "integers": (changed("0.mlp.up_proj", lambda t: t.to(torch.int8)), "is of type I8, as in a quantised"),
    "a missing shard": (without_a_shard, "model-00002-of-"),
    "cut short": (cut_short, "model.safetensors can't be read"),
    "an empty file": (empty_file, "model.safetensors can't be read"),
    "a Git LFS pointer": (pointer, "is a Git LFS pointer"),
    "four bits": (settings(quantization_config={"quant_method": "bitsandbytes"}), "it is quantised (bitsandbytes)"),
    "no type": (settings(model_type=None), "has no model_type"),
    "an unknown type": (settings(model_type="mystery9"), "one of gemma, gemma2"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "give its base model here"),
    "a size that is a word": (settings(hidden_size="wide"), "config.json"),
    "no layers": (settings(num_hidden_layers=0), "num_hidden_layers is at least 1"),
    "layers without end": (settings(num_hidden_layers=10**7), "num_hidden_layers is at least 1 and at most"),
    "an unknown activation": (settings(hidden_act="mystery"), "config.json can't be read"),
    "padding beyond the embedding": (settings(pad_token_id=9999), "config.json can't be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(model: Path, kind: str) -> None:
    spoil, said = BROKEN[kind]
    spoil(model)
    problem = problem_of(model)
    assert said in problem
    assert problem.startswith("model.path: got ") and problem.isprintable() and len(problem) < 700


def test_a_value_that_is_no_number_is_found_when_the_weights_are_read(model: Path) -> None:
    changed("2.mlp.down_proj", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))(model)
    assert problem_of(model) == "", "a header does not tell"
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.mlp\.down_proj\.weight holds NaN or infinite"):
        load_backbone(BaseModel(ModelConfig(path=str(model))))


# --- the experts of a mixture, one by one -------------------------------------------------------------------------


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """With twelve experts: sorted by their names, expert 10 would come before expert 2."""
    key = "num_local_experts" if request.param == "mixtral" else "num_experts"
    base_model(family=request.param, **{key: 12}).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def of_expert(number: int, change: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """Change the last layer's first weight of an expert, or leave it out."""

    def spoil(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(n for n in sorted(weights) if ".2." in n and f".experts.{number}." in n)
        changed = {name: change(weights[name])} if change else {}
        return {n: t for n, t in weights.items() if n != name} | changed

    return lambda directory: reweigh(directory, spoil)


@pytest.mark.parametrize("files", [1, 2])
def test_the_stacks_are_read_as_transformers_stacks_them(mixture: Path, files: int) -> None:
    if files > 1:
        shard(mixture)
    loaded, base = AutoModelForCausalLM.from_pretrained(mixture), BaseModel(ModelConfig(path=str(mixture)))
    weights = loaded.state_dict()
    assert base.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(base.start(name), weight), name
    stack = base.tensors["model.layers.2.mlp.experts.gate_up_proj"]
    whole = weights["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(stack.read_rows(9, 12), whole[9:12]) and stack.read_rows(12, 12).shape == (0, *whole.shape[1:])


EXPERT_SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (of_expert(7, None), "it lacks model.layers.2.mlp.experts."),
    "one more": (
        lambda d: reweigh(d, lambda w: w | {f"{n}x": t for n, t in w.items() if "experts.3" in n}),
        "it holds",
    ),
    "cut": (of_expert(11, lambda t: t[:-1]), "] as its config.json says"),
    "flat": (of_expert(0, torch.flatten), "] as its config.json says"),
    "integers": (of_expert(10, lambda t: t.to(torch.int8)), ".weight is of type I8"),
    "the attention missing": (without("0.self_attn.q_proj"), "it lacks model.layers.0.self_attn.q_proj.weight"),
}


@pytest.mark.parametrize("kind", EXPERT_SPOILT)
def test_a_spoilt_expert_is_refused_in_one_line(mixture: Path, kind: str) -> None:
    spoil, said = EXPERT_SPOILT[kind]
    assert problem_of(mixture) == ""
    spoil(mixture)
    problem = problem_of(mixture)
    assert said in problem and problem.startswith("model.path: got ") and problem.isprintable()


def test_an_expert_s_value_that_is_no_number_is_named(mixture: Path) -> None:
    of_expert(10, lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))(mixture)
    with pytest.raises(ConfigError, match=r"layers\.2\..*experts\.10\..*weight holds NaN or infinite"):
        load_backbone(BaseModel(ModelConfig(path=str(mixture))))


# --- through the command ------------------------------------------------------------------------------------------


def test_a_dry_run_checks_what_is_there(
    model: Path, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(f"model.path={model}", *TINY))
    assert cli.main(["run", recipe, "--dry-run"]) == 0
    assert "everything is checked" in capsys.readouterr().out
    (model / WEIGHTS).rename(model / "kept")
    assert cli.main(["run", recipe, "--dry-run"]) == 0, "no weights are needed"
    assert "names and shapes of the weights" in capsys.readouterr().out
    (model / "pytorch_model.bin").touch()
    assert cli.main(["run", recipe, "--dry-run"]) == 2
    assert "its pytorch_model.bin is not read, since a pickle can run code" in capsys.readouterr().err
    (model / "kept").rename(model / WEIGHTS)
    without("lm_head")(model)
    assert cli.main(["run", recipe, "--dry-run"]) == cli.main(["run", recipe]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("it lacks lm_head.weight" in line for line in said)


def test_a_token_beyond_the_embedding_is_named(model: Path, write_recipe: WriteRecipe) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"].append({"id": size, "content": "[PAD]", **added})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = write_recipe(f"model.path={model}", *TINY)
    with pytest.raises(ConfigError, match=rf"writes '\[PAD\]' as {size}; resize the embedding") as refused:
        check(parse.load(recipe), 1, weights=False)
    assert len(refused.value.problems) == 1


def test_without_a_tokenizer_there_is_nothing_to_read_rows_with(model: Path, write_recipe: WriteRecipe) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"expected a model with its tokenizer; it has no tokenizer\.json"):
        check(parse.load(write_recipe(f"model.path={model}")), 1, weights=False)
