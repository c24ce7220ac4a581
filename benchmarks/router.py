"""Routing accuracy and calibration by the gate's query, latent space and terms, on the prompts of a finished run.

    python benchmarks/router.py runs/small-real

The features are the run's own base features, and so are the splits: geometries are fitted on the training split,
temperatures on the calibration split, and metrics are measured on the held-out split. Compared are the mean of the
prompt alone with the full summary, PCA with the discriminative directions first, several latent sizes, and the lexical
score; the first line is TF-IDF with logistic regression.

Columns: query, latent space, its size and the gate's terms; then accuracy, expected calibration error, Brier score and
negative log-likelihood. Also written to benchmarks/results/router.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from suite import provenance
from torch import Tensor

from alignx_ds.config import parse
from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.data.inputs import read_inputs
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.models.backbone import load_aligned
from alignx_ds.plan import checks
from alignx_ds.routing.fit_geometry import Features, collect, geometry_in, latent_space
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import router_metrics
from alignx_ds.routing.router_report import surface_router
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.runtime import console, distributed

CALIBRATORS = {
    "fractal": ("fractal",),
    "natural": ("natural",),
    "fractal + natural": ("fractal", "natural"),
    "fractal + natural + lexical": ("fractal", "natural", "lexical"),
}


def _words(model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int) -> Tensor:
    """[N, E] the weighted lexical score, by expert as the features are."""
    terms = next(iter(gate_terms(model, rows, pad_id, batch).values()))
    return terms["lexical"][torch.tensor(rows.experts).argsort(stable=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output directory of a finished run")
    parser.add_argument("--latent", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router.json"))
    arguments = parser.parse_args()
    settings = parse.load(arguments.run / "config.yaml")
    inputs = read_inputs(settings, checks.check(settings, settings.launch.ranks))
    model = load_aligned(arguments.run / "model").to(distributed.device())
    data, pad_id, batch = inputs.data, pad_token(inputs.base.tokenizer), settings.evaluation.batch
    train, calibration, held_out = (
        next(iter(collect(model, rows, pad_id, batch)[0].values()))
        for rows in (data.train, data.calibration_rows, data.routed)
    )
    hidden = model.config.text_config.hidden_size
    known, labels = (
        torch.cat([torch.full((len(rows),), e) for e, rows in enumerate(f.by_expert)]) for f in (calibration, held_out)
    )
    calibration_words, held_out_words = (
        _words(model, rows, pad_id, batch) for rows in (data.calibration_rows, data.routed)
    )
    metrics = {"TF-IDF + logistic regression": surface_router(data.splits, settings.expert_names, data.joined)}
    for summary, width in (("mean", hidden), ("mean, largest, smallest, last", 4 * hidden)):
        features, fitted_on, tested_on = (
            Features([r[:, :width] for r in f.by_expert]) for f in (train, calibration, held_out)
        )
        for discriminative in (False, True):
            for latent in arguments.latent:
                space = latent_space(features, latent, settings.seed, discriminative=discriminative)
                geometry = geometry_in(space, features, fitted_on, settings.gate, settings.seed)
                gate = CalibratedGate(geometry, GateSettings(settings.gate.fractal, settings.gate.natural, 1.0))
                with torch.no_grad():
                    fitted, found = (
                        gate.parts(Query(torch.cat([r for r in f.by_expert if len(r)]), words))
                        for f, words in ((fitted_on, calibration_words), (tested_on, held_out_words))
                    )
                for name, terms in CALIBRATORS.items():
                    temperature = fit_temperature(sum_of(fitted, *terms), known)
                    key = f"{summary}; {'discriminative first' if discriminative else 'PCA'}; k = {latent}; {name}"
                    metrics[key] = router_metrics(sum_of(found, *terms) / temperature, labels)
    rows = [[name, *(f"{value:.3f}" for value in m.values())] for name, m in metrics.items()]
    columns = ["query; latent space; size; terms", *next(iter(metrics.values()))]
    console.table("Routers before stage 2, on held-out prompts", columns, rows)
    content = {
        "prompts": {"fitted": len(data.train.examples), "calibration": len(known), "held out": len(labels)},
        "routers": metrics,
    }
    provenance.write(arguments.out, content)


if __name__ == "__main__":
    main()
