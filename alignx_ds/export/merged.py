"""The parts of an aligned model: its experts' factors, and its backbone with experts merged into the FFN weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.mocae.attention import RoutedLinear, padded
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.experts import Factors
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM

Changes = dict[int, dict[str, Tensor]]  # by AlignX layer, by projection: [m, n] fp32


def factors_of(model: AlignXForCausalLM, expert: int) -> dict[int, Factors]:
    """An expert's factors by AlignX layer, without the zeros that pad all experts to the same rank.

    Every layer has the same projections: the lowest has zeros for those of the attention, which no expert changes.
    """
    made, table = {}, backbone_of(model.config.text_config.model_type)
    for index, layer in zip(model.config.layers, alignx_layers(model), strict=True):
        factors = layer.mixture.factors()[expert]
        for p in model.config.attention_ranks:
            module = table.linear(model.backbone, index, p)
            if isinstance(module, RoutedLinear):
                factors.down[p], factors.up[p] = module.factors(expert - 1)
            else:
                factors.down[p], factors.up[p] = padded(Factors({}, {}), p, 1, module)
        made[index] = _trimmed(factors)
    return made


def sum_of(experts: list[tuple[float, dict[int, Factors]]]) -> dict[int, Factors]:
    """By layer: the factors of Σ weight · U·D over these experts, side by side, so that their ranks add up."""
    made = {}
    for layer in experts[0][1]:
        parts = [(weight, by_layer[layer]) for weight, by_layer in experts]
        made[layer] = Factors(
            down={p: torch.cat([f.down[p] for _, f in parts]) for p in parts[0][1].down},
            up={p: torch.cat([weight * f.up[p] for weight, f in parts], dim=1) for p in parts[0][1].down},
        )
    return made


def _trimmed(factors: Factors) -> Factors:
    """Without the trailing rank dimensions in which both factors are zero; at least one is kept."""
    down, up = {}, {}
    for p in factors.down:
        used = factors.down[p].abs().amax(1) + factors.up[p].abs().amax(0)
        rank = max(1, int(used.nonzero().max()) + 1 if used.any() else 0)
        down[p], up[p] = factors.down[p][:rank], factors.up[p][:, :rank]
    return Factors(down, up)


def changes_of(experts: list[tuple[float, dict[int, Factors]]]) -> Changes:
    """Σ weight · U·D over these experts, fp32."""
    made: Changes = {}
    for weight, by_layer in experts:
        for layer, factors in by_layer.items():
            into = made.setdefault(layer, {})
            for p in factors.down:
                change = weight * (factors.up[p].float() @ factors.down[p].float())
                into[p] = into[p] + change if p in into else change
    return made


@torch.no_grad()
def backbone_with(model: AlignXForCausalLM, changes: Changes) -> PreTrainedModel:
    """A copy of the backbone, of its own class, its weights plus these changes (summed in fp32, then rounded)."""
    backbone: PreTrainedModel = copy.deepcopy(model.backbone)
    table = backbone_of(backbone.config.model_type)
    for index in model.config.layers:
        ffn = table.ffn_of(backbone, index).get_submodule("ffn")
        setattr(table.decoder_layers(backbone)[index], table.ffn, ffn)
        for p in model.config.attention_ranks if index in model.config.changed_attention() else ():
            routed = table.linear(backbone, index, p)
            plain = nn.Linear(routed.in_features, routed.out_features, routed.bias is not None, device="meta")
            plain.weight, plain.bias = routed.weight, routed.bias
            table.owner_of(backbone, index, p).set_submodule(getattr(table, p), plain)
        for p, change in changes.get(index, {}).items():
            weight = table.linear(backbone, index, p).weight
            weight.copy_(weight.float() + change.to(weight.device))
    backbone.generation_config = copy.deepcopy(model.generation_config)
    return backbone.eval()
