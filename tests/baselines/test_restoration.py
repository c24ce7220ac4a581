"""Restoration: which weights go back to the aligned model's."""

from __future__ import annotations

import torch

from alignx_ds.baselines.restoration import restorable

ALIGNED = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
MODEL = torch.tensor([[3.0, 3.0, 0.0], [0.0, 1.0, 3.0]])
GRADIENT = torch.tensor([[0.5, -9.0, -0.2], [8.0, 7.0, 0.1]])


def test_only_weights_whose_way_back_lowers_the_loss_are_candidates() -> None:
    """Those that have not moved are none, however large their gradients."""
    found = restorable(MODEL - ALIGNED, GRADIENT, 1.0)
    assert found.tolist() == [[True, False, True], [False, False, True]]


def test_the_largest_gradients_go_first() -> None:
    assert restorable(MODEL - ALIGNED, GRADIENT, 2 / 6).tolist() == [[True, False, True], [False, False, False]]
    assert restorable(MODEL - ALIGNED, GRADIENT, 0.01).sum() == 1
    assert not restorable(torch.zeros(2, 3), GRADIENT, 1.0).any()


def test_a_restored_model_has_lost_less() -> None:
    """On a quadratic loss with its optimum at the aligned weights, every round lowers it."""
    model, losses = MODEL.clone(), []
    for _ in range(4):
        losses.append(float((model - ALIGNED).square().sum()))
        lost = restorable(model - ALIGNED, 2 * (model - ALIGNED), 1 / 6)
        model = torch.where(lost, ALIGNED, model)
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
