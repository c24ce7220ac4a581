"""Settings of a finished model, changed without training: what each value does to a tiny model, and a run's curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, MIXTURES, aligned, attention_experts, base_model, low_rank_experts, random_rows
from torch import Tensor

from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.study import sensitivity
from alignx_ds.study.studied_run import StudiedRun

ROWS = torch.tensor([list(row) for row in random_rows([9, 9, 9], seed=5)])


def model_of(**settings: Any) -> AlignXForCausalLM:
    base = base_model()
    return aligned(base, low_rank_experts(base), **settings)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(ROWS).logits
    return found


@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_the_run_s_own_value_changes_nothing(kind: str) -> None:
    for number, setting in enumerate(sensitivity.settings_of(model_of(kind=kind))):
        assert setting.own in setting.values
        model = model_of(kind=kind)
        if "k = all" in setting.name:
            sensitivity.serve(model, EXPERTS - (kind == "needs"))
        before = logits(model)
        list(sensitivity.settings_of(model))[number].give(model, setting.own)
        assert torch.equal(logits(model), before), setting.name


def test_without_the_experts_change_and_the_calibration_it_is_the_base_model() -> None:
    model, base = model_of(top_k=2), logits(base_model())
    sensitivity.scale_experts(model, 0.0)
    assert (logits(model) - base).abs().max() > 1e-3
    sensitivity.scale_calibrations(model, 0.0)
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", *MIXTURES])
def test_changes_of_the_attention_are_scaled_too(family: str) -> None:
    base = base_model(family=family)
    model = aligned(base, attention_experts(base), top_k=2, output_latent=0)
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    sensitivity.scale_experts(model, 0.0)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)


def test_a_scale_multiplies_every_factor_product() -> None:
    model = model_of()
    before = [layer.mixture.factors() for layer in sensitivity.alignx_layers(model)]
    sensitivity.scale_experts(model, 1.5)
    for old, layer in zip(before, sensitivity.alignx_layers(model), strict=True):
        for own, scaled in zip(old, layer.mixture.factors(), strict=True):
            for projection in own.up:
                torch.testing.assert_close(scaled.delta(projection), 1.5 * own.delta(projection))


def decided(model: AlignXForCausalLM) -> Tensor:
    """The gates of the rows, [B, E]."""
    seen: list[Tensor] = []
    (gate,) = gates_of(model).values()
    handle = gate.register_forward_hook(lambda module, inputs, decision: seen.append(decision.gates))
    logits(model)
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("count", [1, 2, EXPERTS])
def test_so_many_experts_serve(count: int) -> None:
    model = model_of()
    sensitivity.serve(model, count)
    assert ((decided(model) > 0).sum(-1) == count).all()


def test_a_high_temperature_makes_all_gates_equal() -> None:
    model = model_of()
    sensitivity.soften(model, 1e6, EXPERTS)
    torch.testing.assert_close(decided(model), torch.full((len(ROWS), EXPERTS), 1 / EXPERTS), rtol=1e-3, atol=1e-3)


def test_a_weight_is_relative_to_the_run_s() -> None:
    model = model_of(lexical=0.8, more={})
    sensitivity.weigh(model, 2.0, "lexical")
    (gate,) = gates_of(model).values()
    assert gate.settings.lexical == pytest.approx(1.6) and gate.settings.fractal == 0.6
    names = [setting.name for setting in sensitivity.settings_of(model_of(natural=0.0, output_latent=0))]
    assert not any("natural" in name or "calibration" in name for name in names)
    assert any("lexical" in name for name in names)


def test_a_run_s_study_passes_through_its_own_scores(
    study: Callable[[str], dict[str, Any]], studied_run: StudiedRun
) -> None:
    content = study("sensitivity")
    assert content["as_it_is"] == pytest.approx(studied_run.scores(studied_run.aligned()))
    assert len(content["settings"]) == 7
    for name, found in content["settings"].items():
        assert len(found["values"]) == len(found["scores"])
        if "k = all" not in name:
            assert found["scores"][found["values"].index(found["own"])] == content["as_it_is"], name
    bare = content["settings"]["γ, the experts' change"]["scores"][0]
    assert bare != content["as_it_is"]
