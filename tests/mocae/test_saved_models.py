"""Aligned models on disk, and in bf16: the same logits, and a gate that stays in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, MIXTURES, aligned, base_model, low_rank_experts, padded, random_rows, relative
from transformers import AutoModelForCausalLM

from alignx_ds.mocae.layer import gates_of, output_calibrations
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM, Placement


def calibrated(family: str = "llama", tied: bool = False) -> AlignXForCausalLM:
    base = base_model(tied=tied, family=family)
    scope = "shared" if family in MIXTURES else "per_layer"
    model = aligned(base, low_rank_experts(base), scope=scope, top_k=2)
    for gate in gates_of(model).values():
        gate.calibration_temperature.fill_(1.3)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_saved_model_is_loaded_with_the_same_logits(tmp_path: Path, family: str, tied: bool) -> None:
    model = calibrated(family, tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, AlignXForCausalLM)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    ids, mask = padded(random_rows([6, 9]))
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
    assert loaded.config.experts == model.config.experts


@torch.no_grad()
def test_a_model_without_output_calibration_is_saved_without_it(tmp_path: Path) -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base), output_latent=0)
    model.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert loaded.config.gate["output_latent"] == 0 and output_calibrations(loaded) == []
    ids, mask = padded(random_rows([6, 9]), "left")
    assert torch.equal(loaded.eval()(ids, mask).logits, model(ids, mask).logits)
    made = (m.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False) for m in (loaded, model))
    assert torch.equal(*made)


def test_loading_in_bf16_leaves_the_gate_in_fp32(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    for layer, gate in gates_of(loaded).items():
        kept = gates_of(model)[layer].state_dict()
        for name, tensor in gate.state_dict().items():
            assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("placement", [None, Placement(1, 0)], ids=["fused", "parallel"])
@torch.no_grad()
def test_a_bf16_backbone_serves_both_paths(placement: Placement | None, training: bool) -> None:
    base = base_model()
    ids, mask = padded(random_rows([6, 9, 4]))
    exact = aligned(base, low_rank_experts(base), placement=placement).train(training)(ids, mask).logits
    rounded = aligned(base.bfloat16(), low_rank_experts(base), placement=placement).train(training)(ids, mask).logits
    assert rounded.dtype == torch.bfloat16
    assert 0 < relative(rounded[mask.bool()], exact[mask.bool()]) < 0.1


@torch.no_grad()
def test_a_config_made_from_a_live_model_s_leaves_the_model_alone() -> None:
    base = base_model()
    ids, mask = padded(random_rows([6, 9]))
    before = base(ids, attention_mask=mask).logits
    AlignXConfig(text_config=base.config, experts=["generalist", "helpful"], layers=[1])
    assert torch.equal(base(ids, attention_mask=mask).logits, before)
