"""Experts that change projections of the attention: the gate mixes these changes as it mixes those of the FFNs."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import (
    ATTENTION_RANKS,
    EXPERTS,
    FAMILIES,
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
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.export.adapters import config_of, tensors_of
from alignx_ds.export.fidelity import mixing_weights, without_calibration
from alignx_ds.export.merged import backbone_with, changes_of, factors_of, sum_of
from alignx_ds.mocae.attention import RoutedLinear, routed_linears
from alignx_ds.mocae.experts import Factors
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.backbone import load_aligned

IDS, MASK = padded(random_rows([5, 11, 3]))


@torch.no_grad()
def changed(base: PreTrainedModel, experts: dict[int, list[Factors]], weights: list[float]) -> PreTrainedModel:
    """The base model whose weights are changed by the specialists, in the old-fashioned way."""
    model, table = copy.deepcopy(base), table_of(base)
    for layer, of_layer in experts.items():
        for weight, factors in zip(weights, of_layer, strict=True):
            for p in factors.down:
                table.linear(model, layer, p).weight += weight * factors.delta(p)
    return model


def logits(model: nn.Module, **more: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, attention_mask=MASK, use_cache=False, **more).logits[MASK.bool()]
    return found


def mixture(family: str = "llama", **settings: object) -> tuple[PreTrainedModel, AlignXForCausalLM]:
    base = base_model(family=family)
    return base, aligned(base, attention_experts(base), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_expert_is_its_specialist(family: str) -> None:
    base, model = mixture(family, trained=False)
    assert len(routed_linears(model)) == len(ATTENTION_RANKS) and model.config.attention_ranks == ATTENTION_RANKS
    for expert in range(EXPERTS):
        alone = changed(base, attention_experts(base), [float(expert == number) for number in range(1, EXPERTS)])
        assert relative(logits(model, forced=one_hot([expert] * len(IDS))), logits(alone)) < 1e-5
    one = one_hot([1] * len(IDS))
    dense = family not in MIXTURES
    ffns_alone = logits(aligned(base, low_rank_experts(base), trained=False), forced=one) if dense else logits(base)
    assert relative(logits(model, forced=one), ffns_alone) > 0.01


def test_several_experts_are_mixed_by_their_gates() -> None:
    base, model = mixture(trained=False, combine="weights")
    gates = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).repeat(len(IDS), 1)
    with without_calibration(model), mixing_weights(model):
        mixed = logits(model, forced=gates)
    assert relative(mixed, logits(changed(base, attention_experts(base), [0.5, 0.1, 0.3]))) < 1e-5


@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_a_batch_of_several_experts_with_a_cache_says_what_each_row_says_alone(kind: str) -> None:
    _, model = mixture(kind=kind)
    with torch.no_grad():
        whole = model(IDS, attention_mask=MASK, use_cache=False).logits
        for row, length in enumerate(MASK.sum(1).tolist()):
            ids = IDS[row : row + 1][:, MASK[row].bool()]
            assert relative(model(ids, use_cache=False).logits, whole[row : row + 1, MASK[row].bool()]) < 1e-4
            told = model.generate(ids, max_new_tokens=4, do_sample=False)
            mask = torch.zeros_like(told)
            mask[:, :length] = 1
            again = model(told, prompt_mask=mask, use_cache=False).logits[:, length - 1 : -1].argmax(-1)
            assert torch.equal(again, told[:, length:]), "with the cache as without it"


def test_it_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    _, model = mixture()
    model.save_pretrained(tmp_path)
    loaded = load_aligned(tmp_path).eval()
    assert loaded.config.attention_ranks == ATTENTION_RANKS
    assert torch.equal(logits(loaded), logits(model))
    assert sum(isinstance(m, RoutedLinear) for m in loaded.modules()) == len(ATTENTION_RANKS)


@pytest.mark.parametrize("family", ["llama", *MIXTURES])
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
def test_dense_and_adapter_exports_hold_the_changes(weights: list[float], family: str) -> None:
    base, model = mixture(family)
    expected = logits(changed(base, attention_experts(base), weights))
    chosen = [(w, factors_of(model, e)) for e, w in enumerate(weights, start=1) if w]
    dense = backbone_with(model, changes_of(chosen))
    assert not routed_linears(dense) and type(dense) is type(base)
    assert relative(logits(dense), expected) < 1e-5
    table, factors = table_of(base), sum_of(chosen)
    settings = config_of(factors, table, "base")
    adapter = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**_known(settings)))
    found = peft.set_peft_model_state_dict(adapter, tensors_of(factors, table))
    assert not found.unexpected_keys and not [name for name in found.missing_keys if "lora_" in name]
    assert relative(logits(adapter), expected) < 1e-5


def _known(settings: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name != "peft_type"}
