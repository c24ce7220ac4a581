"""The output calibration is the identity until R is trained (invariant 2), then the formula of docs/method.md.

With `gate.output_latent: 0` there is none.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    aligned,
    base_model,
    generator,
    low_rank_experts,
    padded,
    random_geometry,
    random_rows,
    relative,
)
from torch import Tensor

from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.kv_cache import ARGUMENT, kv_cache
from alignx_ds.mocae.layer import alignx_layers, output_calibrations
from alignx_ds.mocae.modeling import Placement
from alignx_ds.mocae.output_calibration import OutputCalibration


def mean_shift(z: Tensor, gates: Tensor, g: Geometry) -> Tensor:
    """Kernel by kernel: the anchors' mean, weighted by their Gaussian kernels; averaged over scales and gates."""
    total = torch.zeros_like(z)
    for e, gate in enumerate(gates):
        for scale in g.scales:
            kernels = (-0.5 * (g.anchors[e] - z).square().sum(-1) / scale**2).softmax(-1)
            total += gate * (kernels @ g.anchors[e]) / len(g.scales)
    return total


def test_the_formula() -> None:
    g = random_geometry(5, 1)
    calibration = OutputCalibration(g, 0.6, 0.4).train()
    with torch.no_grad():
        calibration.reinjection.copy_(torch.randn(32, 5, generator=generator(1)))
    y = torch.randn(2, 6, 32, generator=generator(2))
    gates = torch.rand(2, 1, 4, generator=generator(3)).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    out = calibration(y, gates, mask)
    change = torch.zeros_like(y)
    for b in range(2):
        for t in range(6):
            z = g.projection @ (y[b, t] - g.centre)
            natural = sum(gates[b, 0, e] * (g.means[e] - z) for e in range(4))
            fractal = torch.cat([mean_shift(z[:3], gates[b, 0], g) - z[:3], torch.zeros(2)])
            calibrated = z + 0.6 * fractal + 0.4 * natural
            change[b, t] = calibration.reinjection.detach() @ (calibrated - z)
    assert relative(out.detach() - y, change) < 1e-4
    assert calibration.last_drift is not None
    for b in range(2):
        kept = mask[b].bool()
        expected = float(change[b, kept].square().sum() / y[b, kept].square().sum())
        assert float(calibration.last_drift[b].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_an_untrained_calibration_changes_nothing_and_a_trained_one_does(training: bool) -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base), trained=False).train(training)
    ids, mask = padded(random_rows([6, 9, 4]))
    with torch.no_grad():
        before = model(ids, mask).logits
        calibrations = [layer.calibration for layer in alignx_layers(model)]
        assert len(calibrations) == 2
        for calibration in calibrations:
            calibration.strengths.zero_()  # C(z) = z: no calibration at all
        assert torch.equal(model(ids, mask).logits, before)
        for calibration in calibrations:
            calibration.strengths.copy_(torch.tensor([0.6, 0.4]))
            calibration.reinjection.normal_(std=0.1, generator=generator(1))
        assert relative(model(ids, mask).logits, before) > 0.01


@pytest.mark.parametrize("strength", [0, 1])
def test_either_calibrator_alone_changes_something(strength: int) -> None:
    calibration = OutputCalibration(random_geometry(5, 1), 0.6, 0.4)
    y = torch.randn(2, 6, 32, generator=generator(2))
    with torch.no_grad():
        calibration.strengths[strength] = 0.0
        calibration.reinjection.normal_(generator=generator(1))
    assert relative(calibration(y, torch.full((2, 1, 4), 0.25)), y) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6])
def test_one_hot_gates_need_the_chosen_expert_s_anchors_only(length: int) -> None:
    calibration = OutputCalibration(random_geometry(5, 1), 0.6, 0.4)
    calibration.reinjection.normal_(generator=generator(1))
    y = torch.randn(3, length, 32, generator=generator(2))
    gates = torch.eye(4)[[2, 0, 3]].unsqueeze(1)
    chosen = calibration.gated_step(gates, count=1)
    assert chosen.gates is None and chosen.back.shape[0] == 3
    assert relative(calibration(y, gates, steps=[chosen]) - y, calibration(y, gates) - y) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["choice", "needs"])
@pytest.mark.parametrize("placement", [None, Placement(1, 0)], ids=["fused", "parallel"])
def test_a_model_without_it_is_the_one_with_r_at_zero(placement: Placement | None, kind: str) -> None:
    """With a KV cache too; all other parameters and buffers are the same."""
    base = base_model()
    whole = aligned(base, low_rank_experts(base), placement=placement, kind=kind)
    plain = aligned(base, low_rank_experts(base), placement=placement, kind=kind, output_latent=0)
    plain.load_state_dict({n: t for n, t in whole.state_dict().items() if ".calibration." not in n})
    ids, mask = padded(random_rows([6, 9, 4]), "left")
    found = plain(ids, mask, use_cache=True)
    assert relative(found.logits, whole(ids, mask).logits) > 1e-3
    for calibration in output_calibrations(whole):
        calibration.reinjection.zero_()
    expected = whole(ids, mask, use_cache=True)
    assert relative(found.logits, expected.logits) < 1e-6
    answers, seen = ids[:, -1:], torch.nn.functional.pad(mask, (0, 1), value=1)
    caches = ({ARGUMENT: kv_cache(out)} for out in (found, expected))
    steps = [
        model(answers, seen, use_cache=True, **cache).logits
        for model, cache in zip((plain, whole), caches, strict=True)
    ]
    assert relative(*steps) < 1e-6
