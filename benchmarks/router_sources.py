"""The gate of needs on a real model's features: prompts of its own sources, and of sources that it has not seen.

    python launch/fetch_smollm2.py runs/smollm2-model
    ALIGNX_DATA=DIR python benchmarks/router_sources.py runs/smollm2-model

The gate is the one that a run would have before stage 2 trains it: geometry, lexicon, linear router and temperature are
fitted to the prompts of Alpaca, BeaverTails and TruthfulQA and to those of four more data sets as routing rows. Each of
these four is left out in turn, and two further data sets are never fitted on. No fine-tune is needed, because a gate
that is shared by all layers sees the base model's own features. The first pass through the model takes some 15 minutes
on 2 cores; its features are kept in --cache.

For each source: accuracy of the axis that is needed most, its mean probability (confidence), the ECE of that, and for
XSTest's safe prompts the share that is kept out of harmless. Then how well several signals tell the prompts of the
source that was left out from held-out prompts of the others (area under the ROC curve, 0.5 is chance).
Written to benchmarks/results/router-smollm2.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from suite import provenance
from suite.prompt_features import PromptFeatures
from suite.real_prompts import AXES, SOURCES, read_prompts
from torch import Tensor

from alignx_ds.config.schema import GateConfig
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.labels import source_repeats
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.lexical import Lexicon
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.mocae.turns import query_mask
from alignx_ds.routing.fit_geometry import Features, geometry_in, latent_space
from alignx_ds.routing.fit_lexicon import fit_lexicon
from alignx_ds.routing.fit_router import RouterRows, fit_router
from alignx_ds.routing.gate_terms import sum_of
from alignx_ds.routing.metrics import expected_calibration_error
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.runtime import console

OWN = ("alpaca", "beavertails", "truthfulqa")
ROUTING = ("alpaca_eval", "beavertails_evaluation", "xstest_safe", "xstest_unsafe", "honeset")
OUTSIDE = ("hh_rlhf", "alpaca_cherry")  # never fitted on
LEFT_OUT = {
    "AlpacaEval": ("alpaca_eval",),
    "BeaverTails-Evaluation": ("beavertails_evaluation",),
    "XSTest": ("xstest_unsafe", "xstest_safe"),
    "HoneSet": ("honeset",),
}
SHARES = (0.65, 0.8)  # of a source's prompts: up to the first for training, up to the second for calibration
EXPERTS = 1 + len(AXES)
NEIGHBOURS = 5


@dataclass(frozen=True)
class SourcePrompts:
    """A source's prompts, in random order, their features [N, 4d] and the expert that they need."""

    examples: list[Example]
    features: Tensor
    expert: int

    def part(self, number: int) -> SourcePrompts:
        """0: training, 1: calibration, 2: held out."""
        bounds = [0, *(int(share * len(self.examples)) for share in SHARES), len(self.examples)]
        chosen = slice(bounds[number], bounds[number + 1])
        return SourcePrompts(self.examples[chosen], self.features[chosen], self.expert)


Sources = dict[str, SourcePrompts]


@dataclass(frozen=True)
class FittedGate:
    """A gate and its lexicon, with the latents [N, k] of its training prompts."""

    gate: CalibratedGate
    lexicon: Lexicon
    user_turn: tuple[int, ...]
    latents: Tensor

    @torch.no_grad()
    def query(self, prompts: SourcePrompts) -> Query:
        words = []
        for example in prompts.examples:
            ids = torch.tensor([example.ids])
            words.append(self.lexicon(ids, query_mask(ids, torch.ones_like(ids), self.user_turn)))
        return Query(prompts.features, torch.cat(words))

    @torch.no_grad()
    def needs(self, prompts: SourcePrompts) -> Tensor:
        """[N, A] fp64: the probability that each axis is needed."""
        return self.gate(self.query(prompts)).needs().double()


@torch.no_grad()
def fitted_gate(
    sources: Sources, names: tuple[str, ...], user_turn: tuple[int, ...], settings: GateConfig
) -> FittedGate:
    """Fitted on the training and calibration parts of these sources, as stages/calibrators.py fits a run's gate."""
    rows, features = zip(*(_rows(sources, names, part) for part in (0, 1)), strict=True)
    lexicon = Lexicon(EXPERTS)
    lexicon.load_state_dict(fit_lexicon(rows[0], rows[1], EXPERTS, user_turn))
    pooled = [_pool(r, f) for r, f in zip(rows, features, strict=True)]
    geometry = geometry_in(latent_space(pooled[0], settings.latent, 0), pooled[0], pooled[1], settings, 0)
    gate = CalibratedGate(geometry, GateSettings(**settings.as_dict())).eval()
    made = FittedGate(gate, lexicon, user_turn, gate.latent(Query(features[0], torch.zeros(0))))
    queries = [made.query(SourcePrompts(r.examples, f, 0)) for r, f in zip(rows, features, strict=True)]
    seen, unseen = (
        RouterRows(
            gate.latent(query),
            gate.calibrators_alone(query),
            part.multi_hot(EXPERTS),
            part.weights(),
        )
        for query, part in zip(queries, rows, strict=True)
    )
    gate.router.load_state_dict(fit_router(seen, unseen, geometry.present))
    logits = sum_of(gate.parts(queries[1]))
    gate.calibration_temperature.fill_(fit_temperature(logits, unseen.needs, "needs", unseen.weights))
    return made


def _rows(sources: Sources, names: tuple[str, ...], part: int) -> tuple[LabelledExamples, Tensor]:
    rows, features = LabelledExamples([], []), []
    for name in names:
        prompts = sources[name].part(part)
        rows.add(prompts.examples, prompts.expert, sources=[list(SOURCES).index(name)] * len(prompts.examples))
        features.append(prompts.features)
    return rows, torch.cat(features)


def _pool(rows: LabelledExamples, features: Tensor) -> Features:
    repeats, owners = torch.tensor(source_repeats(rows.experts, rows.sources)), torch.tensor(rows.experts)
    return Features([features[owners == e].repeat_interleave(repeats[owners == e], 0) for e in range(EXPERTS)])


def source_metrics(needs: Tensor, name: str, expert: int) -> dict[str, float]:
    """Of one source's prompts, from the probabilities [N, A] of the axes."""
    confidence, chosen = needs.max(-1)
    right = (chosen == expert - 1).double()
    found = {
        "prompts": len(needs),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "ece": expected_calibration_error(needs, torch.full_like(chosen, expert - 1)),
    }
    if name == "xstest_safe":
        found["kept out of harmless"] = float((needs[:, AXES.index("harmless")] < 0.5).double().mean())
    return found


def stranger_signals(fitted: FittedGate, known: SourcePrompts, strange: SourcePrompts) -> dict[str, float]:
    """By signal, the area under the ROC curve of telling prompts of a source that was left out from known ones."""
    centre = fitted.latents.mean(0)
    spread = torch.linalg.inv(torch.linalg.cholesky(torch.cov(fitted.latents.T)))
    neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(fitted.latents.numpy())

    def signals(prompts: SourcePrompts) -> dict[str, Tensor]:
        query = fitted.query(prompts)
        z, distance = fitted.gate.latent(query), fitted.gate.distance(query)
        near = torch.from_numpy(neighbours.kneighbors(z.numpy())[0]).mean(-1)
        background = ((z - centre) @ spread.T).square().mean(-1)
        return {
            "low confidence": -fitted.needs(prompts).amax(-1),
            "distance": distance,
            "relative distance": distance.square() - background,
            "nearest neighbours": near,
        }

    labels = [0] * len(known.examples) + [1] * len(strange.examples)
    one, other = signals(known), signals(strange)
    return {name: float(roc_auc_score(labels, torch.cat([one[name], other[name]]).numpy())) for name in one}


def _joined(parts: list[SourcePrompts]) -> SourcePrompts:
    return SourcePrompts([e for p in parts for e in p.examples], torch.cat([p.features for p in parts]), 0)


def measure(sources: Sources, user_turn: tuple[int, ...], settings: GateConfig) -> dict[str, Any]:
    """By what was left out: the metrics of every source that says something, and the signals of strangers."""
    found: dict[str, Any] = {}
    for title, left in {"routing rows: none": ROUTING, "left out: none": (), **LEFT_OUT}.items():
        names = tuple(name for name in (*OWN, *ROUTING) if name not in left)
        fitted = fitted_gate(sources, names, user_turn, settings)
        own = {name: source_metrics(fitted.needs(sources[name].part(2)), name, sources[name].expert) for name in names}
        others = {
            name: source_metrics(fitted.needs(sources[name]), name, sources[name].expert) for name in (*left, *OUTSIDE)
        }
        found[title] = {"own": own, "others": others, "temperature": float(fitted.gate.calibration_temperature)}
        if left:
            known, strange = [sources[name].part(2) for name in names], [sources[name] for name in left]
            found[title]["strangers"] = stranger_signals(fitted, _joined(known), _joined(strange))
        console.say(f"{title}: done")
    return found


def show(found: dict[str, Any]) -> None:
    rows = []
    for title, part in found.items():
        for kind, by_source in (("own", part["own"]), ("others", part["others"])):
            for name, m in by_source.items():
                kept = f"{m['kept out of harmless']:.3f}" if "kept out of harmless" in m else ""
                figures = [f"{m[key]:.3f}" for key in ("accuracy", "confidence", "ece")]
                rows.append([title, kind, name, str(m["prompts"]), *figures, kept])
    columns = ["left out", "", "source", "prompts", "accuracy", "confidence", "ECE", "kept out of harmless"]
    console.table("The gate of needs by source", columns, rows)
    signals = {title: part["strangers"] for title, part in found.items() if "strangers" in part}
    names = list(next(iter(signals.values())))
    lines = [[title, *(f"{auc[name]:.2f}" for name in names)] for title, auc in signals.items()]
    console.table(
        "Prompts of the source that was left out, told from others: area under the curve", ["", *names], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a chat model")
    parser.add_argument("--layer", type=int, default=15, help="decoder layer whose FFN inputs the gate sees")
    parser.add_argument("--prompts", type=int, default=1200, help="at most this many of each source")
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=Path("runs/prompt-features"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router-smollm2.json"))
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts, seed=0)
    features = PromptFeatures(arguments.model, arguments.layer, arguments.cache)
    sources: Sources = {}
    for name, texts in prompts.items():
        examples = features.examples(texts)
        sources[name] = SourcePrompts(examples, features.of(name, examples), 1 + AXES.index(SOURCES[name].axis))
    settings = GateConfig(kind="needs", latent=arguments.latent)
    found = measure(sources, tuple(features.user_turn), settings)
    show(found)
    named = {"layer": arguments.layer, "latent": arguments.latent, "prompts": arguments.prompts}
    provenance.write(arguments.out, {"settings": named, "gates": found})


if __name__ == "__main__":
    main()
