"""Experts as LoRA adapters that peft loads, and peft's adapters as experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import (
    ALIGNX_LAYERS,
    FAMILIES,
    MIXTURES,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    one_hot,
    padded,
    random_rows,
    relative,
    table_of,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignx_ds.config.schema import ModelConfig
from alignx_ds.errors import ConfigError, UnreachableError
from alignx_ds.experts.adapters import CONFIG, WEIGHTS, Adapter
from alignx_ds.export.adapters import config_of, tensors_of
from alignx_ds.export.fidelity import mixing_weights, without_calibration
from alignx_ds.export.merged import backbone_with, changes_of, factors_of, sum_of
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel

IDS, MASK = padded(random_rows([6, 9]))


def uneven(base: PreTrainedModel) -> dict[int, list[Factors]]:
    """Specialists whose ranks differ from each other, from layer to layer and from projection to projection."""
    experts = low_rank_experts(base, rank=5)
    for layer, specialists in experts.items():
        for number, f in enumerate(specialists):
            for i, p in enumerate(f.down):
                rank = 5 if (layer, number, p) == (2, 0, "up") else 1 + (layer + number + i) % 4
                f.down[p], f.up[p] = f.down[p][:rank], f.up[p][:, :rank]
    return experts


def write(directory: Path, factors: dict[int, Factors], base: PreTrainedModel) -> None:
    directory.mkdir(exist_ok=True)
    save_file(tensors_of(factors, table_of(base)), directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config_of(factors, table_of(base), "base")))


@torch.no_grad()
def logits(model: Any, **forced: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(IDS, attention_mask=MASK, use_cache=False, **forced).logits
    return found[MASK.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_an_expert_onto_the_base_with_its_logits(tmp_path: Path, family: str) -> None:
    base = base_model(family=family)
    model = aligned(base, uneven(base))
    for expert in (1, 2, 3):
        write(tmp_path / str(expert), factors_of(model, expert), base)
        adapted = PeftModel.from_pretrained(base_model(family=family), tmp_path / str(expert)).eval()
        forced = one_hot([expert, expert])
        with without_calibration(model):
            assert relative(logits(adapted), logits(model, forced=forced)) < 1e-5
        assert relative(logits(adapted), logits(model, forced=forced)) > 1e-3, "the calibration is left out"
        assert relative(logits(adapted), logits(base)) > 1e-2


@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_a_fixed_set_is_the_model_with_these_gates_forced_and_its_weights_mixed(tmp_path: Path, kind: str) -> None:
    base, weights = base_model(), {1: 1.0, 2: 1.0, 3: 0.25}
    model = aligned(base, uneven(base), kind=kind)
    factors = sum_of([(weight, factors_of(model, expert)) for expert, weight in weights.items()])
    write(tmp_path, factors, base)
    adapted = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    dense = backbone_with(model, changes_of([(weight, factors_of(model, e)) for e, weight in weights.items()]))
    forced = torch.tensor([[-1.25, 1.0, 1.0, 0.25]] * 2)
    with without_calibration(model):
        with mixing_weights(model):
            expected = logits(model, forced=forced)
        assert relative(logits(model, forced=forced), expected) > 1e-3, "the outputs are mixed again"
    assert relative(logits(adapted), expected) < 1e-5
    assert relative(logits(dense), expected) < 1e-5


def test_an_adapter_holds_no_padding(tmp_path: Path) -> None:
    base = base_model()
    experts = uneven(base)
    model = aligned(base, experts)
    for number in range(3):
        write(tmp_path, factors_of(model, number + 1), base)
        ranks = {name: t.shape[0] for name, t in load_file(tmp_path / WEIGHTS).items() if "lora_A" in name}
        for layer, specialists in experts.items():
            for p in PROJECTIONS:
                name = f"base_model.model.model.layers.{layer}.mlp.{p}_proj.lora_A.weight"
                assert ranks.pop(name) == specialists[number].rank(p)
        assert not ranks
        settings = json.loads((tmp_path / CONFIG).read_text())
        assert settings["rank_pattern"] == settings["alpha_pattern"] and settings["rank_pattern"]
        assert (
            settings["r"]
            == settings["lora_alpha"]
            == max(f.rank(p) for f in (e[number] for e in experts.values()) for p in PROJECTIONS)
        )


def test_the_calibration_is_back_after_it_was_left_out() -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base))
    before = logits(model)
    with without_calibration(model):
        assert relative(logits(model), before) > 1e-3
    assert torch.equal(logits(model), before)


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    base_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def made_by_peft(target: Path, base: Path, **settings: Any) -> PreTrainedModel:
    """An adapter that peft wrote, with factors that change the logits; returns the model with it."""
    chosen = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "layers_to_transform": ALIGNX_LAYERS, "r": 3}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**chosen | settings))
    source = generator(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    adapted.save_pretrained(target)
    return adapted.eval()


def read(target: Path, base: Path, layers: list[int] = ALIGNX_LAYERS) -> tuple[Adapter, BaseModel]:
    return Adapter(str(target), "axes.helpful.adapter"), BaseModel(ModelConfig(path=str(base), layers=layers))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"lora_alpha": 7},
    "rank-stabilised": {"lora_alpha": 7, "use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 2, "2.mlp.down_proj": 4}, "alpha_pattern": {"1.mlp.up_proj": 5}},
    "one projection": {"target_modules": ["down_proj"]},
    "one layer": {"layers_to_transform": [2]},
    "dropout": {"lora_dropout": 0.5},
    "attention of the upper layer": {
        "target_modules": r".*layers\.2\.self_attn\.[qkvo]_proj|.*layers\.1\.mlp\.up_proj",
        "layers_to_transform": None,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_taken_exactly(tmp_path: Path, base_dir: Path, kind: str) -> None:
    expected = made_by_peft(tmp_path / "adapter", base_dir, **KINDS[kind])
    adapter, base = read(tmp_path / "adapter", base_dir)
    assert list(adapter.problems(base)) == []
    factors = adapter.factors(base)
    assert sorted(factors) == ALIGNX_LAYERS
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    model: AlignXForCausalLM = aligned(plain, {layer: [factors[layer]] * 3 for layer in ALIGNX_LAYERS}, trained=False)
    assert relative(logits(model, forced=one_hot([2, 2])), logits(expected)) < 1e-5
    merged = backbone_with(model, changes_of([(1.0, factors)]))
    assert relative(logits(merged), logits(expected)) < 1e-5


def test_peft_s_default_targets_are_taken_but_for_the_lowest_layer(tmp_path: Path, base_dir: Path) -> None:
    """q_proj and v_proj of every layer: the gate decides after the lowest layer's, and what is lost is known."""
    expected = made_by_peft(tmp_path / "adapter", base_dir, target_modules=None, layers_to_transform=None)
    adapter, base = read(tmp_path / "adapter", base_dir, [0, *ALIGNX_LAYERS])
    assert list(adapter.problems(base)) == [] and adapter.changes_attention(base)
    factors = adapter.factors(base)
    assert [sorted(factors[layer].down.keys() - set(PROJECTIONS)) for layer in base.layers] == [[], *[["q", "v"]] * 2]
    modules = {name: m for name, m in expected.named_modules() if hasattr(m, "lora_B")}
    norms = {name: float(m.get_delta_weight("default").square().sum()) for name, m in modules.items()}
    lost = [name for name in norms if ".layers.0." in name]
    assert len(lost) == 2
    assert adapter.lost(base) == pytest.approx(sum(norms[name] for name in lost) / sum(norms.values()), rel=1e-5)
    with torch.no_grad():
        for name in lost:
            modules[name].lora_B["default"].weight.zero_()
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    merged = {layer: {p: f.delta(p) for p in f.down} for layer, f in factors.items()}
    with torch.no_grad():
        for layer, changes in merged.items():
            for p, change_of in changes.items():
                base.table.linear(plain, layer, p).weight += change_of
    assert relative(logits(plain), logits(expected)) < 1e-5


@pytest.mark.parametrize("family", MIXTURES)
def test_on_a_mixture_of_experts_an_adapter_changes_the_attention_alone(tmp_path: Path, family: str) -> None:
    base_model(family=family).save_pretrained(tmp_path / "base")
    upper: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [2]}
    expected = made_by_peft(tmp_path / "own", tmp_path / "base", **upper)
    adapter, base = read(tmp_path / "own", tmp_path / "base")
    assert list(adapter.problems(base)) == [] and adapter.lost(base) == 0
    factors = adapter.factors(base)
    assert [sorted(factors[layer].down) for layer in base.layers] == [[], ["o", "q"]]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model: AlignXForCausalLM = aligned(plain, {layer: [factors[layer]] * 3 for layer in ALIGNX_LAYERS}, trained=False)
    assert relative(logits(model, forced=one_hot([2, 2])), logits(expected)) < 1e-5
    change(tmp_path / "own", base_model_name_or_path=str(tmp_path / "other"))
    base_model(family=family, seed=5).save_pretrained(tmp_path / "other")
    assert ["set model.path to that" in str(p) for p in read(tmp_path / "own", tmp_path / "base")[0].problems(base)]
    made_by_peft(tmp_path / "router", tmp_path / "base", target_modules=["q_proj"], modules_to_save=["gate"])
    told = [str(p) for p in read(tmp_path / "router", tmp_path / "base")[0].problems(base)]
    assert any("an adapter of these projections: q_proj, k_proj, v_proj, o_proj;" in line for line in told), told


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another module": (
        {"target_modules": ["lm_head", "up_proj"], "layers_to_transform": None},
        "which no expert hosts",
    ),
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "biases"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "layers": ({"layers_to_transform": [0, 2]}, "set model.layers=[0, 1, 2]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_expert_can_not_be_is_refused_by_name(tmp_path: Path, base_dir: Path, kind: str) -> None:
    settings, named = REFUSED[kind]
    made_by_peft(tmp_path / "adapter", base_dir, **settings)
    adapter, base = read(tmp_path / "adapter", base_dir)
    problems = [str(p) for p in adapter.problems(base)]
    assert any(named in p for p in problems)
    assert all(p.startswith("axes.helpful.adapter:") and "\n" not in p for p in problems)


def test_another_base_model_s_adapter_is_refused(tmp_path: Path, base_dir: Path) -> None:
    base_model(intermediate_size=40).save_pretrained(tmp_path / "other")
    made_by_peft(tmp_path / "adapter", tmp_path / "other")
    adapter, base = read(tmp_path / "adapter", base_dir)
    assert all("another base model" in str(p) for p in adapter.problems(base))
    assert len(list(adapter.problems(base))) == 6


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_half_an_adapter_is_none(tmp_path: Path, base_dir: Path, missing: str) -> None:
    made_by_peft(tmp_path / "adapter", base_dir)
    (tmp_path / "adapter" / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        read(tmp_path / "adapter", base_dir)


@pytest.mark.parametrize(
    ("name", "content"), [(CONFIG, "{"), (CONFIG, "[]"), (CONFIG, '{"peft_type": "IA3"}'), (WEIGHTS, "?")]
)
def test_files_that_are_no_adapter_are_refused(tmp_path: Path, base_dir: Path, name: str, content: str) -> None:
    made_by_peft(tmp_path / "adapter", base_dir)
    (tmp_path / "adapter" / name).write_text(content)
    with pytest.raises(ConfigError, match=r"axes\.helpful\.adapter"):
        list(Adapter(str(tmp_path / "adapter"), "axes.helpful.adapter").problems(BaseModel(ModelConfig(str(base_dir)))))


def test_an_adapter_that_is_nowhere_is_named(base_dir: Path) -> None:
    with pytest.raises((ConfigError, UnreachableError), match=r"axes\.helpful\.adapter"):
        read(Path("no/such/adapter"), base_dir)


def change(target: Path, file: str = CONFIG, **values: Any) -> None:
    """Set keys of the adapter's config, or replace tensors of its weights whose name ends with the keyword."""
    if file == CONFIG:
        (target / CONFIG).write_text(json.dumps(json.loads((target / CONFIG).read_text()) | values))
        return
    tensors = load_file(target / WEIGHTS)
    for name in tensors:
        for part, made in values.items():
            if part in name:
                tensors[name] = made(tensors[name])
    save_file({name: t for name, t in tensors.items() if t is not None}, target / WEIGHTS)


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "untrained": (WEIGHTS, {"lora_B": torch.zeros_like}, "its factors multiply to zero"),
    "switched off": (CONFIG, {"lora_alpha": 0}, "its factors multiply to zero"),
    "not finite": (WEIGHTS, {"1.mlp.up_proj.lora_A": nan}, "1.mlp.up_proj.lora_A.weight holds NaN"),
    "a part missing": (
        WEIGHTS,
        {"2.mlp.down_proj": lambda _: None},
        "no factors of model.layers.2.mlp.down_proj, which",
    ),
    "another rank": (CONFIG, {"r": 16}, "have rank 3, its config says 16"),
    "another rank in a pattern": (
        CONFIG,
        {"rank_pattern": {"1.mlp.up_proj": 5}},
        "up_proj have rank 3, its config says 5",
    ),
    "no such module": (CONFIG, {"target_modules": ["gate_proj", "c_fc"]}, "'c_fc', and the base model has no such"),
    "a module not named": (
        CONFIG,
        {"target_modules": ["gate_proj", "up_proj"]},
        "factors of model.layers.1.mlp.down_proj, which",
    ),
    "integers": (WEIGHTS, {"1.mlp.up_proj.lora_A": lambda t: t.to(torch.int8)}, "is of type I8: it is quantised"),
    "another base": (CONFIG, {"base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}, "Llama-2-7b-chat-hf'; set"),
    "another type": (CONFIG, {"peft_type": "ADALORA"}, "not of PEFT's type LORA but of 'ADALORA'"),
    "a pattern that is none": (CONFIG, {"rank_pattern": {"(": 3}}, "can't be read ("),
    "alpha that is a word": (CONFIG, {"lora_alpha": "much"}, "can't be read (ValueError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_adapter_that_is_not_what_it_says_is_refused(tmp_path: Path, base_dir: Path, kind: str) -> None:
    made_by_peft(tmp_path / "adapter", base_dir)
    file, values, said = WRONG[kind]
    change(tmp_path / "adapter", file, **values)
    adapter, base = read(tmp_path / "adapter", base_dir)
    try:
        found = [str(problem) for problem in adapter.problems(base)]
    except ConfigError as error:
        found = [str(error)]
    assert len(found) == 1 and said in found[0], found
    assert found[0].startswith("axes.helpful.adapter: got ")


def test_a_base_model_is_known_by_its_name_or_by_its_weights(tmp_path: Path, base_dir: Path) -> None:
    made_by_peft(tmp_path / "adapter", base_dir)
    adapter, base = read(tmp_path / "adapter", base_dir)
    other = Path(shutil.copytree(base_dir, tmp_path / "copy"))
    cached = tmp_path / "models--owner--base" / "snapshots" / "0123"
    for name in ("owner/base", "BASE", "/gone/base/", str(cached), "", None, str(other)):
        adapter.config["base_model_name_or_path"] = name
        assert list(adapter.problems(base)) == [], name
    base_model(seed=5).save_pretrained(other)
    assert [p.key for p in adapter.problems(base)] == ["axes.helpful.adapter"], "the same shapes, but other weights"
    settings = json.loads((base_dir / "config.json").read_text())
    (base_dir / "config.json").write_text(json.dumps(settings | {"_name_or_path": "owner/Original-7b"}))
    adapter.config["base_model_name_or_path"] = "mirror/original-7B"
    assert list(adapter.problems(base)) == []
