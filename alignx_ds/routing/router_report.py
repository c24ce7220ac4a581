"""The router on held-out prompts: its metrics, an ablation of its terms, and a text classifier to compare it with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import pad_token
from alignx_ds.data.inputs import EncodedData
from alignx_ds.data.labels import label_set, multi_hot, one_by_one
from alignx_ds.data.splits import DataSplits
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.routing.by_source import SourceMetrics, by_source
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import confusion, router_metrics
from alignx_ds.routing.temperature import fit_temperature

WORD = re.compile(r"\b\w\w+\b")  # TF-IDF's
ABLATIONS: dict[str, tuple[str, ...]] = {  # none named: all terms of the gate
    "linear": ("linear",),
    "fractal": ("fractal",),
    "natural": ("natural",),
    "lexical": ("lexical",),
    "fractal + natural": ("fractal", "natural"),
    "fractal + natural + lexical": ("fractal", "natural", "lexical"),
    "all": (),
}


@dataclass(frozen=True)
class RouterReport:
    """The lowest gate on held-out prompts: it is the one that decides in the shared scope. Metrics by name."""

    metrics: dict[str, float]
    uncalibrated: dict[str, float]  # the same before the post-hoc temperature
    temperature: float
    confusion: list[list[int]]  # rows: the experts that the prompts need
    ablations: dict[str, dict[str, float]]  # by the terms that are left
    surface: dict[str, float]  # of TF-IDF and logistic regression, trained and tested on the same prompts
    sources: dict[str, SourceMetrics] = field(default_factory=dict)


def router_report(model: AlignXForCausalLM, data: EncodedData, base: BaseModel, config: RunConfig) -> RouterReport:
    """Temperatures are fitted on the calibration split, metrics are those of the held-out prompts. Collective."""
    pad_id, batch = pad_token(base.tokenizer), config.evaluation.batch
    lowest, gate = next(iter(gates_of(model).items()))
    fitted, tested = (gate_terms(model, rows, pad_id, batch)[lowest] for rows in (data.calibration_rows, data.routed))
    kind, experts = gate.settings.kind, len(config.expert_names)
    known, labels = data.calibration_rows.multi_hot(experts), data.routed.multi_hot(experts)
    temperature = float(gate.calibration_temperature)
    ablations = {}
    for name, terms in (ABLATIONS | {name: (name,) for name in gate.settings.more}).items():
        t = fit_temperature(sum_of(fitted, *terms), known, kind, data.calibration_rows.weights())
        ablations[name] = router_metrics(sum_of(tested, *terms) / t, labels, kind)
    logits = sum_of(tested)
    return RouterReport(
        metrics=router_metrics(logits / temperature, labels, kind),
        uncalibrated=router_metrics(logits, labels, kind),
        temperature=temperature,
        confusion=confusion(logits, labels, kind),
        ablations=ablations,
        surface=surface_router(data.splits, config.expert_names),
        sources=by_source(model, data, logits / temperature, config.expert_names, pad_id, batch),
    )


def surface_router(rows: DataSplits, experts: list[str]) -> dict[str, float]:
    """Metrics of a router that sees the words only: scikit-learn's TF-IDF of words and pairs, logistic regression."""
    known, asked = (
        [(row.asked, label_set(row, experts, owner)) for owner, name in enumerate(experts) for row in sides[name].rows]
        for sides in (rows.train, rows.held_out)
    )
    lines, labels, shares = one_by_one([needed for _, needed in known])
    present = sorted(set(labels))
    logs = torch.full((len(asked), len(experts)), -torch.inf, dtype=torch.float64)
    logs[:, present] = 0.0  # of a single class, which needs no classifier
    if len(present) > 1:
        # Without a word of two letters in any prompt there are only characters to tell them by.
        words = any(WORD.search(prompt) for prompt, _ in known)
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, analyzer="word" if words else "char")
        router = make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000))
        router.fit([known[i][0] for i in lines], labels, logisticregression__sample_weight=shares)
        logs[:, list(router.classes_)] = torch.from_numpy(router.predict_log_proba([prompt for prompt, _ in asked]))
    return router_metrics(logs, multi_hot([needed for _, needed in asked], len(experts)))
