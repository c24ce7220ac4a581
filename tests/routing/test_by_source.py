"""The router by source: what is reported of a source is what the gate decides on its prompts, one by one."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import brier_score_loss
from tiny_models import VOCABULARY, aligned, base_model, generator, low_rank_experts

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.inputs import EncodedData
from alignx_ds.data.splits import DataSplits
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.by_source import SourceMetrics, by_source
from alignx_ds.routing.gate_terms import gate_terms, sum_of

NAMES = ["generalist", "kind", "safe", "true"]
NONE = LabelledExamples([], [])
SETS = {"both": [(1, 2)] * 9 + [(0,)] * 4, "safe_only": [(2,)] * 7}


def prompts(count: int, seed: int) -> list[Example]:
    drawn = torch.randint(3, VOCABULARY, (count, 12), generator=generator(seed)).tolist()
    return [Example(tuple(ids[: 4 + n % 8]), 4 + n % 8) for n, ids in enumerate(drawn)]


def measured(kind: str) -> tuple[AlignXForCausalLM, EncodedData, dict[str, SourceMetrics]]:
    base = base_model()
    model = aligned(base, low_rank_experts(base), kind=kind).eval()
    lowest, gate = next(iter(gates_of(model).items()))
    with torch.no_grad():
        gate.router.weight.normal_(generator=generator(5))
        gate.calibration_temperature.fill_(0.7)
    sets = {
        name: LabelledExamples(prompts(len(needs), seed), [needed[0] for needed in needs], list(needs))
        for seed, (name, needs) in enumerate(SETS.items())
    }
    routed = LabelledExamples(prompts(20, 7), [0] * 5 + [2] * 15)
    routing = {"more (safe)": LabelledExamples(prompts(6, 8), [2] * 6)}
    splits = DataSplits({}, {}, {}, frozenset())
    data = EncodedData(splits, {}, NONE, NONE, {}, NONE, routed, routing, sets)
    logits = sum_of(gate_terms(model, routed, 0, 8)[lowest]) / 0.7
    return model, data, by_source(model, data, logits, NAMES, 0, 8)


@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_a_source_s_metrics_are_of_the_gate_s_decisions_on_its_prompts(kind: str) -> None:
    model, data, found = measured(kind)
    assert [(name, s.kind, s.prompts) for name, s in found.items()] == [
        *(("generalist", "own", 5), ("safe", "own", 15), ("more (safe)", "routing", 6)),
        *(("both", "set", 13), ("safe_only", "set", 7)),
    ]
    routed = {name: [i for i, e in enumerate(data.routed.experts) if e == n] for n, name in enumerate(NAMES)}
    rows = {name: ([data.routed.examples[i] for i in own], [data.routed.needs[i] for i in own])
            for name, own in routed.items() if own}  # fmt: skip
    rows |= {name: (s.examples, s.needs) for name, s in (data.routing | data.sets).items()}
    layer = min(gates_of(model))
    for name, (examples, needs) in rows.items():
        right, sure, forecasts = [], [], []
        for example, needed in zip(examples, needs, strict=True):
            with torch.no_grad():
                model(torch.tensor([example.ids]), use_cache=False)
            decision = model.routing.decisions[layer]
            p = decision.probabilities()[0, 1:] if kind == "choice" else decision.needs()[0]
            forecasts.append(p)
            sure.append(float(decision.confidence()))
            if kind == "choice":
                right.append(int(decision.probabilities().argmax()) in needed)
            else:
                right.append({n for n in range(1, 4) if p[n - 1] > 0.5} == set(needed) - {0})
        assert found[name].metrics["accuracy"] == pytest.approx(sum(right) / len(right))
        assert found[name].confidence == pytest.approx(sum(sure) / len(sure), abs=1e-5)
        for n, axis in enumerate(NAMES[1:], start=1):
            outcomes = [int(n in needed) for needed in needs]
            brier = brier_score_loss(outcomes, torch.stack(forecasts)[:, n - 1], labels=[0, 1], pos_label=1)
            assert found[name].axes[axis]["brier"] == pytest.approx(brier, abs=1e-5)
            assert 0 <= found[name].axes[axis]["ece"] <= 1


def test_a_source_s_content_is_flat() -> None:
    content = measured("needs")[2]["both"].content()
    assert list(content) == ["kind", "prompts", "accuracy", "ece", "brier", "nll", "confidence", "axes"]
    assert content["axes"].keys() == set(NAMES[1:])
