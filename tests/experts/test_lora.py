"""LoRA specialists: their factors are the expert, and PEFT's LoRA with the same factors is the same model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    EXPERTS,
    TABLE,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    one_hot,
    padded,
    random_rows,
    relative,
)
from torch import nn
from transformers import PreTrainedModel

from alignx_ds.config.schema import ExpertsConfig, LoraConfig, RunConfig, SpecialistConfig
from alignx_ds.experts.lora import Lora, LoraLinear, add_lora
from alignx_ds.mocae.experts import PROJECTIONS, Factors

TARGETS = ["gate_proj", "down_proj"]
IDS, MASK = padded(random_rows([5, 11, 3]))


def settings(*, rank: int = 4, rslora: bool = False, dropout: float = 0.0) -> Lora:
    lora = LoraConfig(alpha=6.0, rslora=rslora, dropout=dropout, targets=TARGETS)
    train = SpecialistConfig(trainable="lora", lora=lora)
    return Lora.of(RunConfig(train=train, experts=ExpertsConfig(rank=rank)))


def layers_of(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def trained(lora: Lora) -> PreTrainedModel:
    """A model as stage 1 leaves it: both factors are far from zero."""
    model = base_model()
    add_lora(model, TABLE, ALIGNX_LAYERS, lora, seed=3)
    for number, module in enumerate(layers_of(model).values()):
        module.lora_up.copy_(0.3 * torch.randn(module.lora_up.shape, generator=generator(number)))
    return model.eval()


def logits(model: nn.Module, **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, attention_mask=MASK, use_cache=False, **more).logits[MASK.bool()]
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_with_the_same_factors_is_the_same_model(rslora: bool) -> None:
    model = trained(settings(rslora=rslora))
    given = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=TARGETS, layers_to_transform=ALIGNX_LAYERS
    )
    theirs = peft.get_peft_model(base_model(), given).eval()
    with torch.no_grad():
        for name, module in layers_of(model).items():
            own = theirs.get_submodule(f"base_model.model.{name}")
            own.lora_A["default"].weight.copy_(module.lora_down)
            own.lora_B["default"].weight.copy_(module.lora_up)
    assert relative(logits(model), logits(theirs)) < 1e-5
    assert relative(logits(model), logits(base_model())) > 0.1


def test_the_factors_are_the_expert_under_a_forced_gate() -> None:
    lora = settings()
    model = trained(lora)
    experts = low_rank_experts(base_model())
    for layer in ALIGNX_LAYERS:
        view = TABLE.view(TABLE.ffn_of(model, layer))
        down, up = {}, {}
        for p in PROJECTIONS:
            module = view.projection(p)
            own = isinstance(module, LoraLinear)
            assert own == (p in lora.projections)
            down[p] = module.lora_down.detach() if own else torch.zeros(1, module.in_features)
            up[p] = module.scale * module.lora_up.detach() if own else torch.zeros(module.out_features, 1)
        experts[layer][1] = Factors(down, up)
    mixture = aligned(base_model(), experts, trained=False)
    assert relative(logits(mixture, forced=one_hot([2] * len(IDS))), logits(model)) < 1e-5
    assert EXPERTS > 2


def test_at_first_nothing_is_changed_and_the_factors_alone_are_trained() -> None:
    base, model = base_model(), base_model()
    names = {name for name, _ in model.named_parameters()}
    add_lora(model, TABLE, ALIGNX_LAYERS, settings(), seed=3)
    assert torch.equal(logits(model), logits(base))
    found = dict(model.named_parameters())
    assert {name for name, p in found.items() if p.requires_grad} == found.keys() - names
    assert names <= found.keys(), "the base model's weights keep their names"
    again, other = copy.deepcopy(base), copy.deepcopy(base)
    add_lora(again, TABLE, ALIGNX_LAYERS, settings(), seed=3)
    add_lora(other, TABLE, ALIGNX_LAYERS, settings(), seed=4)
    for name, module in layers_of(model).items():
        assert torch.equal(module.lora_down, layers_of(again)[name].lora_down), "every rank draws the same"
        assert not torch.equal(module.lora_down, layers_of(other)[name].lora_down)


def test_dropout_is_of_the_factors_input_in_training_alone() -> None:
    model = trained(settings(dropout=0.5))
    module = next(iter(layers_of(model).values()))
    x = torch.randn(7, module.in_features, generator=generator(1))
    whole, frozen = module(x), nn.Linear.forward(module, x)
    module.train()
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.allclose(module(x), frozen + module.scale * dropped @ module.lora_down.T @ module.lora_up.T, atol=1e-5)
    assert not torch.allclose(module(x), whole)
