"""Fit the lexical calibrator: TF-IDF weights and a logistic regression over hashed tokens, scikit-learn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.mocae.lexical import BUCKETS, bucket_counts

PENALTY = 10.0  # C: how little the weights are held back


def fit_lexicon(rows: LabelledExamples, calibration_rows: LabelledExamples, experts: int) -> dict[str, Tensor]:
    """A `Lexicon`'s state dict. `calibration_rows` rows only set the scale: their scores' standard deviation is one."""
    weighing = TfidfTransformer(sublinear_tf=True)
    known = weighing.fit_transform(_counts(rows.examples))
    weights, bias = np.zeros((experts, BUCKETS)), np.zeros(experts)
    present = sorted(set(rows.experts))
    if len(present) > 1:
        fitted = LogisticRegression(C=PENALTY, max_iter=1000).fit(known, rows.experts)
        weights[present], bias[present] = _each_class(fitted.coef_), _each_class(fitted.intercept_[:, None])[:, 0]
        scores = (weighing.transform(_counts(calibration_rows.examples)) @ weights.T + bias)[:, present]
        spread = max(float(scores.std()), 1e-6)
        weights, bias = weights / spread, bias / spread
    return {
        "rarity": torch.from_numpy(weighing.idf_).float(),
        "weights": torch.from_numpy(weights).float(),
        "bias": torch.from_numpy(bias).float(),
    }


def _counts(examples: list[Example]) -> Any:
    """[N, H] sparse, of the prompts alone."""
    lines = []
    for example in examples:
        ids = torch.tensor([example.ids[: example.prompt_length]])
        lines.append(sparse.csr_matrix(bucket_counts(ids, torch.ones_like(ids)).double().numpy()))
    return sparse.vstack(lines, format="csr")


def _each_class(coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """One line per class: for two classes scikit-learn gives their difference."""
    if len(coefficients) == 1:
        return np.concatenate([-coefficients / 2, coefficients / 2])
    return coefficients
