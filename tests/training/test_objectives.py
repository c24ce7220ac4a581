"""Each objective's loss is its paper's: TRL's on the same logits, and a hand-computed case where TRL has none.

The only test module that imports TRL, which takes about 5 s of one core after transformers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from alignx_ds.data.batches import Batch
from alignx_ds.training import objectives
from alignx_ds.training.losses import answer_log_probabilities

PAIRS, T, V, BETA = 4, 9, 11, 0.3
TOLERANCE = 1e-5


class Head(nn.Identity):
    out_features = V


class Logits:
    """A model that answers every batch with the same logits, which are its last hidden states too."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.head = logits, Head()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.logits))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Good answers, then bad ones, of several lengths."""
    source = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (2 * PAIRS, T), generator=source)
    labels = ids.clone()
    for line in range(2 * PAIRS):
        labels[line, : 2 + line % 3] = -100
        labels[line, T - line % 2 :] = -100
    owners = torch.arange(2 * PAIRS)[:, None].expand(-1, T)
    return Batch(ids, torch.ones_like(ids), (labels == -100).long(), labels, owners=owners)


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """Of the model and of the reference."""
    source = torch.Generator().manual_seed(4)
    return torch.randn(2 * PAIRS, T, V, generator=source), torch.randn(2 * PAIRS, T, V, generator=source)


def ours(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the answers, their means over tokens), both [2, PAIRS]."""
    found = answer_log_probabilities(Logits(logits), batch, 2 * PAIRS)
    lengths = (batch.labels[:, 1:] != -100).sum(1)
    return found.view(2, -1), (found / lengths).view(2, -1)


class Accelerator:
    device = torch.device("cpu")

    def gather_for_metrics(self, values: Tensor) -> Tensor:
        return values

    gather = gather_for_metrics


class FusedHead:
    """What TRL's patched models return: the log-probabilities of the labels, 0 where there is none."""

    training = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, labels: Tensor, **inputs: Any) -> Any:
        targets, wanted = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        each = self.logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0] * wanted
        return SimpleNamespace(log_probs=each, entropy=each, mean_logits=each, is_top1=wanted)


def trl_self(logits: Tensor, **settings: Any) -> Any:
    """What the trainer's loss methods use of their trainer."""
    return SimpleNamespace(
        model=FusedHead(logits),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        beta=BETA,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def trl_dpo(kind: str, logits: Tensor, batch: Batch, reference: Tensor) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = trl_self(
        logits,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
    )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": (batch.labels != -100).long(),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss


def test_dpo_is_trl_s(logits: tuple[Tensor, Tensor], batch: Batch) -> None:
    (good, bad), _ = ours(logits[0], batch)
    reference, _ = ours(logits[1], batch)
    made = objectives.dpo(good, bad, reference[0], reference[1], BETA).mean()
    assert float((made - trl_dpo("sigmoid", logits[0], batch, reference)).abs()) < TOLERANCE


def test_bco_without_shift_and_weights_is_trl_s(logits: tuple[Tensor, Tensor], batch: Batch) -> None:
    """TRL takes the good and the bad answers as pairs, and sums the two losses."""
    answers, _ = ours(logits[0], batch)
    reference, _ = ours(logits[1], batch)
    good = torch.tensor([[1.0], [0.0]])
    made = objectives.bco(answers, reference, good, 0.0, BETA).sum(0).mean()
    assert float((made - trl_dpo("bco_pair", logits[0], batch, reference)).abs()) < TOLERANCE


def test_bco_shifts_rewards_and_weighs_bad_answers() -> None:
    answer, reference = torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -3.0])
    good, weights = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.5])
    made = objectives.bco(answer, reference, good, 0.1, 0.5, weights)
    expected = [math.log1p(math.exp(-(1.0 - 0.1))), 2.5 * math.log1p(math.exp(-0.5 - 0.1))]
    assert made.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad_weight", [1.0, 1.7])
def test_kto_is_trl_s(bad_weight: float, logits: tuple[Tensor, Tensor], batch: Batch) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    answers, reference = (ours(part, batch)[0].flatten() for part in logits)
    good = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1])
    mismatched = answers + torch.linspace(-1.0, 2.0, 2 * PAIRS)
    trainer = trl_self(
        logits[0],
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.0,
        undesirable_weight=bad_weight,
        _compute_kl_logps=lambda model, inputs: mismatched,
    )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": (batch.labels != -100).long(),
        "label": good,
        "ref_logps": reference,
        "ref_KL_logps": answers,
    }
    expected = KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    shift = (mismatched - answers).mean().clamp(min=0)
    made = objectives.kto(answers, reference, good.float(), shift, BETA, bad_weight).mean()
    assert float((made - expected).abs()) < TOLERANCE


def test_orpo_is_trl_s(logits: tuple[Tensor, Tensor], batch: Batch) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    flat = ORPOTrainer.get_batch_logps(logits[0], batch.labels, average_log_prob=True)
    expected = -ORPOTrainer.odds_ratio_loss(trl_self(logits[0]), flat[:PAIRS], flat[PAIRS:])[0]
    _, (good, bad) = ours(logits[0], batch)
    assert float((objectives.orpo(good, bad, BETA) - expected).abs().max()) < TOLERANCE


def test_orpo_is_finite_where_an_answer_is_certain() -> None:
    certain = torch.zeros(1, requires_grad=True)
    loss = objectives.orpo(certain, torch.tensor([-0.5]), BETA)
    loss.sum().backward()
    assert certain.grad is not None and bool(torch.isfinite(certain.grad).all()) and bool(torch.isfinite(loss).all())


def test_simpo_is_trl_s(logits: tuple[Tensor, Tensor], batch: Batch) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    flat = CPOTrainer.get_batch_logps(logits[0], batch.labels, average_log_prob=True)
    settings = {"alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.7, "label_smoothing": 0.0}
    expected = CPOTrainer.cpo_loss(trl_self(logits[0], **settings), flat[:PAIRS], flat[PAIRS:])[0]
    _, (good, bad) = ours(logits[0], batch)
    assert float((objectives.simpo(good, bad, BETA, 0.7) - expected).abs().max()) < TOLERANCE


def test_poft_weighs_a_row_by_how_likely_it_was() -> None:
    """Of a row whose tokens have become e times as likely, and of one that is as likely as before."""
    per_token = torch.tensor([-1.0, -2.0], requires_grad=True)
    losses = objectives.poft(per_token, torch.tensor([-2.0, -2.0]), 1.0)
    assert losses.tolist() == pytest.approx([-math.log(math.e / (1 + math.e)), math.log(2)], rel=1e-6)
    losses.sum().backward()
    assert per_token.grad is not None and per_token.grad.tolist() == pytest.approx([-1 / (1 + math.e), -0.5], rel=1e-6)


def test_the_gradient_is_the_difference_quotient() -> None:
    values = torch.tensor([[-3.0, -2.0], [-4.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-3.5, -2.5], [-3.0, -1.5]], dtype=torch.float64)

    def loss(answers: Tensor) -> Tensor:
        return objectives.dpo(answers[0], answers[1], reference[0], reference[1], BETA)

    assert torch.autograd.gradcheck(loss, (values,))
    assert torch.allclose(loss(values)[0], -logsigmoid(torch.tensor(BETA * 1.5, dtype=torch.float64)))
