"""Gates with some of their parts: the terms sum to the logits, and the stored gate is restored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alignx_ds.mocae import gate as gates
from alignx_ds.mocae.gate import TERMS
from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.router_report import router_report
from alignx_ds.study.contributions import ALL, ladder
from alignx_ds.study.gate_parts import GateTerms, gate_with
from alignx_ds.study.studied_run import StudiedRun


def test_the_parts_sum_to_the_gate_s_own_logits(studied_run: StudiedRun) -> None:
    model = studied_run.aligned()
    terms = gate_terms(model, studied_run.data.routed, studied_run.pad_id, studied_run.batch)
    for index, gate in gates_of(model).items():
        kept = []
        hook = gate.register_forward_hook(lambda module, given, decision, kept=kept: kept.append(decision.logits))
        again = gate_terms(model, studied_run.data.routed, studied_run.pad_id, studied_run.batch)
        hook.remove()
        logits = torch.cat(kept) * gate.calibration_temperature
        lengths = torch.tensor([example.prompt_length for example in studied_run.data.routed.examples])
        seen = lengths.argsort(stable=True)  # prompts run in the order of their lengths
        assert torch.allclose(sum_of(terms[index])[seen], logits, atol=1e-4, rtol=1e-5)
        assert torch.equal(sum_of(again[index]), sum(terms[index][name] for name in TERMS))  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [("linear",), ("linear", "lexical"), ("fractal", "natural"), TERMS, ()])
def test_a_gate_that_serves_with_some_parts_says_what_those_parts_say(
    studied_run: StudiedRun, parts: tuple[str, ...]
) -> None:
    model = studied_run.aligned()
    rows = (studied_run.data.routed, studied_run.pad_id, studied_run.batch)
    whole = gate_terms(model, *rows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with gate_with(model, parts, 2, temperatures=dict.fromkeys(whole, 0.5)):
        served = gate_terms(model, *rows)
        assert all(float(gate.calibration_temperature) == 0.5 for gate in gates_of(model).values())
        assert {layer.settings.top_k for layer in alignx_layers(model)} == {2}
        prompt = torch.tensor([studied_run.data.routed.examples[0].ids])
        with torch.no_grad():
            model(prompt, use_cache=False)
        assert all(int((d.gates > 0).sum()) == 2 for d in model.routing.decisions.values())
    for index, terms in served.items():
        expected = sum_of(whole[index], *parts) if parts else torch.zeros_like(whole[index]["linear"])
        assert torch.allclose(sum_of(terms), expected, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "as it was before"
    assert {layer.settings.top_k for layer in alignx_layers(model)} == {model.config.gate_settings().top_k}
    assert all(gate.settings == model.config.gate_settings() for gate in gates_of(model).values())


def test_a_further_calibrator_is_a_part_as_in_the_run_s_own_report(
    studied_run: StudiedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts where all parts count, alone and beside the others, and nowhere else."""
    monkeypatch.setitem(gates.CALIBRATORS, "nearest", lambda z, geometry, _: -torch.cdist(z, geometry.means.float()))
    model = studied_run.aligned()
    for gate in gates_of(model).values():
        gate.settings = replace(gate.settings, more={"nearest": 0.5})
    terms = GateTerms.of(model, studied_run)
    parts = ladder(terms.names)
    assert parts[ALL] == (*TERMS, "nearest") and parts["linear + nearest"] == ("linear", "nearest")
    report = router_report(model, studied_run.data, studied_run.base, studied_run.config).ablations
    for reported, own in {"all": parts[ALL], "nearest": ("nearest",), "linear": ("linear",)}.items():
        assert terms.metrics(own) == pytest.approx(report[reported], abs=1e-6)
    assert report["all"] != pytest.approx(terms.metrics(TERMS), abs=1e-6)
    rows = (studied_run.data.routed, studied_run.pad_id, studied_run.batch)
    for combination in (parts[ALL], ("linear",), ("linear", "nearest")):
        with gate_with(model, combination, 1):
            served = gate_terms(model, *rows)
        for index, found in served.items():
            assert torch.allclose(sum_of(found), sum_of(terms.held_out[index], *combination), atol=1e-4)
