"""Backbones whose FFNs are mixtures of experts already: these stay as they are, and the attention has our experts."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    EXPERTS,
    MIXTURES,
    aligned,
    attention_experts,
    base_model,
    low_rank_experts,
    one_hot,
    padded,
    random_rows,
    relative,
    table_of,
)

from alignx_ds.mocae.attention import routed_linears
from alignx_ds.mocae.experts import ATTENTION
from alignx_ds.mocae.layer import alignx_layers, freeze_trunk, gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.unchanged import UnchangedFfn

IDS, MASK = padded(random_rows([5, 11, 3]))
pytestmark = pytest.mark.parametrize("family", MIXTURES)


def model_of(family: str, **settings: object) -> AlignXForCausalLM:
    base = base_model(family=family)
    return aligned(base, attention_experts(base), **settings)  # type: ignore[arg-type]


def test_its_table_names_its_attention_and_no_projection_of_the_ffn(family: str) -> None:
    base = base_model(family=family)
    table, weights = table_of(base), base.state_dict(keep_vars=True)
    assert table.projections == ()
    for p in ATTENTION:
        assert weights[table.weight_name(1, p)] is table.linear(base, 1, p).weight
    with pytest.raises(AssertionError):
        table.weight_name(1, "up")


def test_the_active_width_is_that_of_the_experts_that_a_token_goes_through(family: str) -> None:
    base = base_model(family=family)
    stack = base.model.layers[2].mlp.experts.down_proj  # [experts, d, width]
    assert table_of(base).active_width(base.config) == base.config.num_experts_per_tok * stack.shape[-1]


@torch.no_grad()
def test_the_forced_generalist_is_the_base_model(family: str) -> None:
    base = base_model(family=family)
    plain = base(IDS, attention_mask=MASK).logits[MASK.bool()]
    model = aligned(base, low_rank_experts(base), trained=False)
    for training in (False, True):  # in training, padding is left out of the AlignX layers
        made = model.train(training)(IDS, MASK, forced=one_hot([0] * len(IDS))).logits[MASK.bool()]
        assert relative(made, plain) < 1e-5
    for expert in range(1, EXPERTS):
        made = model.eval()(IDS, MASK, forced=one_hot([expert] * len(IDS))).logits[MASK.bool()]
        assert relative(made, plain) > 0.01


@torch.no_grad()
def test_mixing_weights_is_mixing_outputs(family: str) -> None:
    """No FFN's weights are mixed, and those of the attention are linear."""
    found = [model_of(family, combine=how, kind="needs", top_k=0)(IDS, MASK).logits for how in ("outputs", "weights")]
    assert torch.equal(*found)


@pytest.mark.parametrize("experts", [True, False])
def test_stage_2_trains_what_is_ours_and_nothing_of_the_backbone(family: str, experts: bool) -> None:
    model = model_of(family).train()
    before = {name: p.detach().clone() for name, p in copy.deepcopy(model).named_parameters()}
    freeze_trunk(model, experts=experts)
    model(IDS, MASK).logits[MASK.bool()].square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    ours = {id(p) for module in routed_linears(model) for p in module.trained()} if experts else set()
    ours |= {id(p) for gate in gates_of(model).values() for p in gate.parameters()}
    ours |= {id(p) for layer in alignx_layers(model) if layer.calibration for p in layer.calibration.parameters()}
    assert changed == {name for name, p in model.named_parameters() if id(p) in ours}
    assert not [name for name in changed if ".ffn." in name]


def test_its_state_is_the_fused_one_and_has_no_factors_of_the_ffn(family: str) -> None:
    model = model_of(family)
    assert model.fused_state().keys() == model.state_dict().keys()
    assert not [name for name in model.state_dict() if ".mixture." in name]
    for index, layer in zip(ALIGNX_LAYERS, alignx_layers(model), strict=True):
        assert isinstance(layer.mixture, UnchangedFfn) and not list(layer.mixture.parameters()), index
        assert len(layer.mixture.factors()) == EXPERTS
