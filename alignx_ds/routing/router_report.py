"""The router on held-out prompts: its metrics, an ablation of its terms, and a text classifier to compare it with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import pad_token
from alignx_ds.data.inputs import NOTHING_JOINED, EncodedData, JoinedRows
from alignx_ds.data.labels import LabelSet, label_set, multi_hot, one_by_one, source_weights
from alignx_ds.data.rows import Row
from alignx_ds.data.splits import DataSplits
from alignx_ds.mocae.gate import NEVER
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.routing.by_source import SourceMetrics, by_source
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import confusion, router_metrics
from alignx_ds.routing.temperature import fit_temperature

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

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
        surface=surface_router(data.splits, config.expert_names, data.joined, kind),
        sources=by_source(model, data, logits / temperature, config.expert_names, pad_id, batch),
    )


def surface_router(
    rows: DataSplits, experts: list[str], joined: Mapping[str, JoinedRows] = MappingProxyType({}), kind: str = "choice"
) -> dict[str, float]:
    """Metrics of a router that sees the words only: scikit-learn's TF-IDF of words and pairs, logistic regression.

    It is trained on the prompts that the gate learns from, with the same weights: training rows, joined rows and
    routing rows. In needs there is a regression for every axis.
    """
    known = _learned(rows, experts, joined)
    asked = [(i, row) for i, name in enumerate(experts) for row in rows.held_out[name].rows]
    sets, wanted = ([label_set(row, experts, owner) for owner, row in some] for some in (known, asked))
    weights = source_weights([owner for owner, _ in known], [row.source for _, row in known])
    prompts, questions = ([row.asked for _, row in some] for some in (known, asked))
    find = _log_odds if kind == "needs" else _log_probabilities
    return router_metrics(find(prompts, sets, weights, questions, len(experts)), multi_hot(wanted, len(experts)), kind)


def _learned(rows: DataSplits, experts: list[str], joined: Mapping[str, JoinedRows]) -> list[tuple[int, Row]]:
    """(owner, row) of all that a gate is fitted on."""
    found = []
    for owner, name in enumerate(experts):
        routing = [row for part in rows.routing if part.owner == name for row in part.train.rows]
        company = joined.get(name, NOTHING_JOINED).rows
        found += [(owner, row) for row in (*rows.train[name].rows, *company, *routing)]
    return found


def _log_probabilities(
    prompts: list[str], sets: list[LabelSet], weights: Tensor | None, questions: list[str], experts: int
) -> Tensor:
    """[N, E] of the questions: one regression with a class for every expert that any prompt needs."""
    lines, labels, shares = one_by_one(sets, weights)
    present = sorted(set(labels))
    logs = torch.full((len(questions), experts), -torch.inf, dtype=torch.float64)
    logs[:, present] = 0.0  # of a single class, which needs no classifier
    if len(present) > 1:
        from sklearn.pipeline import make_pipeline

        router = make_pipeline(_vectorizer(prompts), _regression())
        router.fit([prompts[i] for i in lines], labels, logisticregression__sample_weight=shares)
        logs[:, list(router.classes_)] = torch.from_numpy(router.predict_log_proba(questions))
    return logs


def _log_odds(
    prompts: list[str], sets: list[LabelSet], weights: Tensor | None, questions: list[str], experts: int
) -> Tensor:
    """Logits [N, E] of needs, the generalist's 0: a regression for every axis that some of the prompts need."""
    vectorizer = _vectorizer(prompts)
    known, asked = vectorizer.fit_transform(prompts), vectorizer.transform(questions)
    logits = torch.zeros(len(questions), experts, dtype=torch.float64)
    shares = None if weights is None else weights.numpy()
    for axis, needed in enumerate(multi_hot(sets, experts).bool().T[1:].numpy(), start=1):
        if needed.any() and not needed.all():
            router = _regression().fit(known, needed, sample_weight=shares)
            logits[:, axis] = torch.from_numpy(router.decision_function(asked))
        else:
            logits[:, axis] = -NEVER if needed.any() else NEVER
    return logits


def _vectorizer(prompts: list[str]) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Without a word of two letters in any prompt there are only characters to tell them by.
    words = any(WORD.search(prompt) for prompt in prompts)
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, analyzer="word" if words else "char")


def _regression() -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=1000)
