"""Fits the lexical calibrator: scikit-learn's TF-IDF weights and logistic regression over hashed tokens and pairs.

Ours, not the paper's (docs/method.md). Shapes: N rows, H buckets, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.labels import one_by_one
from alignx_ds.mocae.lexical import BUCKETS, bucket_counts
from alignx_ds.mocae.turns import query_mask

INVERSE_REGULARISATION = 10.0  # scikit-learn's C


def fit_lexicon(
    rows: LabelledExamples, calibration_rows: LabelledExamples, experts: int, user_turn: Sequence[int] = ()
) -> dict[str, Tensor]:
    """A `Lexicon`'s state dict, fp32, fitted on the rows' prompts: in a dialogue on the last user turn.

    The calibration split sets only the scale: the standard deviation of its scores becomes one. Experts without rows
    have zero weights. A prompt that needs several experts counts for each of them in part.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    weighing = TfidfTransformer(sublinear_tf=True)
    known = weighing.fit_transform(_counts(rows.examples, user_turn))
    weights, bias = np.zeros((experts, BUCKETS)), np.zeros(experts)
    lines, labels, shares = one_by_one(rows.needs, rows.weights())
    present = sorted(set(labels))
    if len(present) > 1:
        classifier = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
        fitted = classifier.fit(known[lines], labels, sample_weight=shares)
        weights[present], bias[present] = _each_class(fitted.coef_), _each_class(fitted.intercept_[:, None])[:, 0]
        scores = (weighing.transform(_counts(calibration_rows.examples, user_turn)) @ weights.T + bias)[:, present]
        spread = max(float(scores.std()), 1e-6)
        weights, bias = weights / spread, bias / spread
    return {
        "rarity": torch.from_numpy(weighing.idf_).float(),
        "weights": torch.from_numpy(weights).float(),
        "bias": torch.from_numpy(bias).float(),
    }


def _counts(examples: list[Example], user_turn: Sequence[int]) -> Any:
    """Bucket counts of the prompts' last user turns, [N, H] fp64, sparse."""
    lines = []
    for example in examples:
        ids = torch.tensor([example.ids[: example.prompt_length]])
        lines.append(
            sparse.csr_matrix(bucket_counts(ids, query_mask(ids, torch.ones_like(ids), user_turn)).double().numpy())
        )
    return sparse.vstack(lines, format="csr")


def _each_class(coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """One row per class; of two classes scikit-learn has a single row, their difference."""
    if len(coefficients) == 1:
        return np.concatenate([-coefficients / 2, coefficients / 2])
    return coefficients
