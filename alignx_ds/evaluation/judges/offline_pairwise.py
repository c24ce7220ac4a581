"""A pairwise judge without a language model: it has learned from published preferences which of two outputs is better.

For machines that can't ask a language model. It sees length, form and phrases, not whether an output is right, so its
agreement with held-out preferences and its length bias are reported beside every win rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from math import tanh
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import HELD_OUT
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.evaluation.alpaca_eval import (
    DRAW,
    Annotation,
    Output,
    read_preferences,
    read_reference,
    reference_of,
    win_rate,
)
from alignx_ds.evaluation.judges import answer_features
from alignx_ds.evaluation.judges.protocol import Judge, Metrics, Verdict, percent
from alignx_ds.routing.metrics import router_metrics
from alignx_ds.runs import manifest

HELD_OUT_SHARE = 0.2  # of the instructions
MODELS_HELD_OUT = 0.25  # share of the models that were compared
LEAST = 50  # pairs to learn from
SETTINGS = {
    "max_iter": 150,
    "learning_rate": 0.05,
    "max_leaf_nodes": 8,
    "min_samples_leaf": 40,
    "l2_regularization": 5.0,
}
Pair = tuple[str, str, str]  # instruction, the other output, ours


class OfflinePairwise:
    """`score` is the win rate. Metrics named judge_… are the judge's own, on instructions and models that are held out.

    Swapping the two outputs turns a probability p into 1 − p. The classifier is trained with the first verdict. Raises
    DataError if there are too few preferences.
    """

    def __init__(self, preferences: Sequence[Annotation], references: Mapping[str, Output]) -> None:
        self.references = references
        decided = [a for a in preferences if a.preference not in (None, 0, DRAW) and pair(a)[1] != pair(a)[2]]
        models = sorted({a.generator_2 for a in decided}, key=lambda name: Row(name, "").position(HELD_OUT))
        unseen = set(models[: round(MODELS_HELD_OUT * len(models))])
        # the salt of the axes' own split: what they hold out is not trained on here either
        cut = {i: Row(i, "").position(HELD_OUT) < HELD_OUT_SHARE for i in {a.instruction for a in decided}}
        self.learned = [a for a in decided if a.generator_2 not in unseen and not cut[a.instruction]]
        self.held_out = [a for a in decided if a.generator_2 in unseen and cut[a.instruction]]
        for side, what, least in ((self.learned, "to learn from", LEAST), (self.held_out, "held out", 1)):
            if len(side) < least or (side is self.learned and len(set(map(ours_is_better, side))) < 2):
                found = f"{len(side)} decided pairs of {len(models)} models {what}"
                need = f"it needs {LEAST} to learn from, won by either side, and one of another model and instruction"
                raise DataError(f"the offline pairwise judge has {found}; {need}: give it more preferences")

    @property
    def identity(self) -> dict[str, Any]:
        pairs = [[*pair(a), a.preference] for a in (*self.learned, *self.held_out)]
        return {
            "judge": "offline_pairwise",
            "preferences": manifest.fingerprint({"learned": len(self.learned), "pairs": pairs}),
            "references": manifest.fingerprint({i: asdict(output) for i, output in self.references.items()}),
            "settings": manifest.fingerprint({**SETTINGS, "phrases": answer_features.PHRASES}),
            "scikit-learn": sklearn.__version__,
        }

    def applies(self, row: Row) -> bool:
        """Whether there is a reference output to compare with."""
        return bool(row.response) or row.prompt.strip() in self.references

    def verdicts(self, rows: Sequence[Row], answers: Sequence[str]) -> Iterator[Verdict]:
        """{"preference": from 1 (the reference is better) to 2 (ours is), "longer": characters that ours has more}."""
        baselines = [reference_of(row, self.references).output.strip() for row in rows]
        pairs = [(row.asked, b, answer.strip()) for row, b, answer in zip(rows, baselines, answers, strict=True)]
        for (_, baseline, answer), p in zip(pairs, self._probabilities(pairs), strict=True):
            preference = DRAW if baseline == answer else 1.0 + float(p)
            yield {"preference": preference, "longer": len(answer) - len(baseline)}

    def metrics(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Metrics:
        """`length_controlled` is the win rate at equal length, `longer_wins` the % of verdicts for the longer one."""
        preferences, longer = [v["preference"] for v in verdicts], [v["longer"] for v in verdicts]
        result = win_rate(preferences)
        unequal = [(p > DRAW) == (more > 0) for p, more in zip(preferences, longer, strict=True) if more and p != DRAW]
        return {
            "score": result.win_rate,
            "standard_error": result.standard_error,
            "length_controlled": length_controlled(preferences, longer),
            "longer_wins": percent(unequal),
            "n": result.n,
            **{f"judge_{k}": v for k, v in self.quality.items()},
        }

    @cached_property
    def quality(self) -> Metrics:
        """Metrics on the held-out pairs, between 0 and 1.

        `agreement` is the share of verdicts that equal the annotator's, `majority` and `length_alone` what the more
        frequent verdict and "the longer one is better" would have; `follows_length` is the share of verdicts for the
        longer one. `win_rate_error` is the mean difference of a model's win rate from that by the annotator.
        """
        truth = np.array([ours_is_better(a) for a in self.held_out])
        p = self._probabilities([pair(a) for a in self.held_out])
        longer = np.array([len(ours) > len(other) for _, other, ours in map(pair, self.held_out)])
        models = np.array([a.generator_2 for a in self.held_out])
        off = [abs(p[models == name].mean() - truth[models == name].mean()) for name in np.unique(models)]
        gates = torch.from_numpy(np.stack((1 - p, p), axis=1)).log()
        return {
            "agreement": float(np.mean((p > 0.5) == truth)),
            "majority": float(max(truth.mean(), 1 - truth.mean())),
            "length_alone": float(np.mean(longer == truth)),
            "follows_length": float(np.mean((p > 0.5) == longer)),
            "win_rate_error": float(np.mean(off)),
            "ece": router_metrics(gates, torch.from_numpy(truth).long())["ece"],
            "rows": float(len(truth)),
        }

    @cached_property
    def _classifier(self) -> Any:
        x, better = differences(list(map(pair, self.learned))), np.array(list(map(ours_is_better, self.learned)))
        model = HistGradientBoostingClassifier(**SETTINGS, early_stopping=False, random_state=0)
        return model.fit(np.concatenate((x, -x)), np.concatenate((better, ~better)))

    def _probabilities(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """P(ours is better), the mean over both orders of the outputs."""
        if not pairs:
            return np.zeros(0)
        x = differences(pairs)
        ours, other = (self._classifier.predict_proba(order)[:, 1] for order in (x, -x))
        p: NDArray[np.float64] = (ours + 1 - other) / 2
        return p


def length_controlled(preferences: Sequence[float], longer: Sequence[int]) -> float:
    """The win rate in percent at equal length, by a logistic regression with the difference in length as a term.

    `longer` has the characters that ours has more than the reference; the term is tanh of it in standard deviations, as
    in AlpacaEval 2 (Dubois et al. 2024), whose terms for the difficulty of each instruction are left out: they are
    fitted to many models at once.
    """
    spread = float(np.std(longer)) if len(longer) else 0.0
    if not spread:
        return win_rate(preferences).win_rate
    term = np.array([[tanh(more / spread)] for more in longer])
    wins = np.array(preferences) - 1.0
    labels, weights = np.repeat([1, 0], len(wins)), np.concatenate((wins, 1 - wins))
    if not 0 < wins.mean() < 1:
        return 100.0 * float(wins.mean())
    fitted = LogisticRegression().fit(np.concatenate((term, term)), labels, sample_weight=weights)
    return 100.0 * float(fitted.predict_proba([[0.0]])[0, 1])


def pair(annotation: Annotation) -> Pair:
    """Instruction and outputs, as rows have them."""
    return annotation.instruction.strip(), annotation.output_1.strip(), annotation.output_2.strip()


def ours_is_better(annotation: Annotation) -> bool:
    return (annotation.preference or DRAW) > DRAW


def differences(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Features of our output less those of the other, [N, features]."""
    known = cache(answer_features.features)  # a reference is in many pairs
    return np.array([np.subtract(known(i, ours), known(i, other)) for i, other, ours in pairs], dtype=np.float64)


def make(settings: JudgesConfig) -> Judge:
    """Raises ConfigError if judges.preferences is not a file, DataError if its rows can't be used."""
    path = settings.preferences
    if not Path(path).is_file():
        fix = "set it to AlpacaEval's annotations, with both outputs"
        raise ConfigError(Problem("judges.preferences", path, "a file of preferences", fix))
    references = read_reference(Path(settings.reference)) if settings.reference else {}
    return OfflinePairwise(read_preferences(Path(path)), references)
