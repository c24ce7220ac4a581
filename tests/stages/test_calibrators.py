"""What is fitted before stage 2 trains: geometries, and routers from joined rows and routing rows as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import generator

from alignx_ds.config import parse
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.inputs import read_inputs
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.layer import gates_of, output_calibrations
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.sizes import counts
from alignx_ds.routing.fit_router import fit_router, router_rows
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import router_metrics
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages import calibrators
from alignx_ds.stages.assembly import ExpertFactors, FittedCalibrators, assemble
from alignx_ds.stages.calibrators import first_of_each_set, fit_calibrators, saved_calibrators
from alignx_ds.stages.stage import StageContext

JOINED = [f"axes.{axis}.join.share=1.0" for axis in ("helpful", "harmless", "honest")]
SMALL = ["model.layers=[3, 4]", "gate.latent=32", "gate.output_latent=8", "gate.anchors=8", "gate.temperature=2.0"]


def context_of(recipe: Path, *overrides: str) -> StageContext:
    config = parse.load(recipe, [*SMALL, *JOINED, *overrides])
    base = BaseModel(config.model)
    return StageContext(config, base, read_inputs(config, base).data, Outputs.of(config))


def random_experts(base: BaseModel) -> ExpertFactors:
    source = generator(2)
    found: ExpertFactors = {}
    for layer in base.layers:
        shapes = {p: base.weight(layer, p).shape for p in PROJECTIONS}
        found[layer] = [
            Factors(
                {p: 0.2 * torch.randn(2, s[1], generator=source) for p, s in shapes.items()},
                {p: 0.2 * torch.randn(s[0], 2, generator=source) for p, s in shapes.items()},
            )
            for _ in range(3)
        ]
    return found


def exact(model: AlignXForCausalLM, rows: LabelledExamples) -> float:
    (terms,) = gate_terms(model, rows, 0, 64).values()
    return router_metrics(sum_of(terms), rows.multi_hot(4), "needs")["accuracy"]


def test_the_router_of_needs_is_fitted_on_joined_rows_and_kept(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(write_recipe(), "gate.kind=needs")
    factors, train = random_experts(context.base), context.data.train
    fitted, hashes = saved_calibrators(context, factors, tmp_path / "saved", {"made": "of this"})
    assert fitted.routers.keys() == fitted.gates.keys() == {3}
    model = assemble(context.config, context.base, factors, fitted, None)
    several = [i for i, needed in enumerate(train.needs) if len(needed) > 1]
    assert len(several) >= 30
    joined = LabelledExamples(
        *([column[i] for i in several] for column in (train.examples, train.experts, train.needs))
    )
    assert exact(model, joined) > 0.8
    blank = assemble(context.config, context.base, factors, replace(fitted, routers={}), None)
    assert exact(blank, joined) < 0.4
    rows, unseen = (router_rows(blank, some, 0, 64)[3] for some in (train, context.data.calibration_rows))
    for name, tensor in fit_router(rows, unseen, fitted.gates[3].present, context.config.gate).items():
        torch.testing.assert_close(fitted.routers[3][name], tensor, atol=1e-3, rtol=1e-3)

    monkeypatch.setattr(calibrators, "fit_calibrators", lambda *_: pytest.fail("they are fitted again"))
    resumed = saved_calibrators(context, factors, tmp_path / "saved", {"made": "of this"})
    assert resumed[1] == hashes
    for name, tensor in fitted.routers[3].items():
        assert torch.equal(resumed[0].routers[3][name], tensor)


def test_the_router_of_a_choice_is_fitted_beside_the_calibrators(write_recipe: Callable[..., Path]) -> None:
    """Beside calibrators that count little it tells the prompts apart by itself."""
    weak = (f"gate.{term}=0.1" for term in ("fractal", "natural", "lexical"))
    context = context_of(
        write_recipe(), *(f"axes.{axis}.join.share=0" for axis in ("helpful", "harmless", "honest")), *weak
    )
    factors = random_experts(context.base)
    fitted = fit_calibrators(context, factors)
    model, blank = (
        assemble(context.config, context.base, factors, some, None) for some in (fitted, replace(fitted, routers={}))
    )
    rows, unseen = (router_rows(blank, some, 0, 64)[3] for some in (context.data.train, context.data.calibration_rows))
    for name, tensor in fit_router(rows, unseen, fitted.gates[3].present, context.config.gate).items():
        torch.testing.assert_close(fitted.routers[3][name], tensor, atol=1e-3, rtol=1e-3)
    losses = []
    for some in (model, blank):
        (terms,) = gate_terms(some, context.data.calibration_rows, 0, 64).values()
        losses.append(router_metrics(sum_of(terms), context.data.calibration_rows.multi_hot(4), "choice")["nll"])
    assert losses[0] < 0.2 < 0.8 < losses[1]


def test_without_output_calibration_no_outputs_are_collected(write_recipe: Callable[..., Path]) -> None:
    context = context_of(write_recipe(), "gate.output_latent=0")
    factors = random_experts(context.base)
    fitted = fit_calibrators(context, factors)
    assert fitted.outputs == {} and fitted.gates.keys() == {3}
    kept = FittedCalibrators.from_tensors(fitted.tensors())
    model = assemble(context.config, context.base, factors, kept, None)
    assert output_calibrations(model) == []
    router = sum(p.numel() for p in gates_of(model)[3].router.parameters())
    assert counts(context.config, context.base)["gates and calibrations"] == router


def test_of_each_label_set_and_source_there_are_some() -> None:
    """Joined rows and routing rows are there beside the experts' own, as many as `gate.rows` of each set."""
    needs = [(1,)] * 50 + [(1, 2)] * 20 + [(2,)] * 10 + [(1,)] * 25
    owners, sources = [1] * 70 + [2] * 10 + [1] * 25, [0] * 80 + [1] * 25
    rows = LabelledExamples([Example((n,), 1) for n in range(105)], owners, needs, sources)
    chosen = first_of_each_set(rows, 12)
    assert [e.ids[0] for e in chosen.examples] == [*range(7), *range(50, 62), *range(70, 80), *range(80, 85)]
    assert chosen.needs == [(1,)] * 7 + [(1, 2)] * 12 + [(2,)] * 10 + [(1,)] * 5
    assert chosen.weights() is not None
