"""Good answers without a bad one, among the pairs of an objective."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, base_model, random_rows
from torch.nn.functional import logsigmoid

from alignx_ds.config.schema import AxisConfig, TrainConfig
from alignx_ds.data.compared import ComparedRows
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.training.engine import Plan
from alignx_ds.training.losses import answer_log_probabilities
from alignx_ds.training.metrics import step_metrics
from alignx_ds.training.objectives import Settings
from alignx_ds.training.preferences import ObjectiveLoss

PROMPT, BETA, WEIGHT, SCALE = 3, 0.7, 0.3, 0.1
ALONE = [False, True, False]


def examples(seed: int) -> list[Example]:
    rows = random_rows([7, 9, 8], seed)
    return [Example(tuple(row), PROMPT) for row in rows]


@pytest.fixture
def loss() -> ObjectiveLoss:
    axis = AxisConfig(prompt="", schema="dpo", train="", objective="dpo", beta=BETA, sft_weight=WEIGHT)
    rows = ComparedRows(LabelledExamples(examples(1), [0] * 3, others=examples(2)), alone=ALONE)
    plan = Plan.of(TrainConfig(batch=3), "float32", steps=1)
    return ObjectiveLoss(Settings.of(axis), rows, plan, VOCABULARY - 1, 0, packed=True)


def test_only_its_nll_counts(loss: ObjectiveLoss) -> None:
    model = base_model()
    loss.reference = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    part = loss.build((0, 1, 2), SCALE)
    found = loss(model, part)
    answers = answer_log_probabilities(model, part.batch, 6).view(2, 3)
    margins = answers[0] - answers[1] - (loss.reference[:, 0] - loss.reference[:, 1])
    of_pairs = -logsigmoid(BETA * margins[[0, 2]]).sum() / 3
    torch.testing.assert_close(found.loss, of_pairs - WEIGHT * SCALE * answers[0].sum())

    metrics, _ = step_metrics([found], stop=False)
    scalars = loss.scalars(metrics)
    assert scalars["rewards/margin"] == pytest.approx(float(BETA * margins[[0, 2]].mean()), rel=1e-5)
    assert scalars["log_probabilities/bad"] == pytest.approx(float(answers[1, [0, 2]].mean()), rel=1e-5)
    assert "pairs" not in scalars
