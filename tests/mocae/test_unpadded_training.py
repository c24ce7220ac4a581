"""In training the fused path leaves padding out of what the AlignX layers compute."""

from __future__ import annotations

import pytest
import torch
from tiny_models import aligned, base_model, low_rank_experts, padded, random_rows, relative
from torch import Tensor

from alignx_ds.mocae.layer import alignx_layers, freeze_trunk
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.output_calibration import OutputCalibration

ROWS = random_rows([4, 9, 1, 6], seed=71)


def model(kind: str) -> AlignXForCausalLM:
    base = base_model()
    made = aligned(base, low_rank_experts(base), kind=kind).train()
    freeze_trunk(made)
    return made


def loss(made: AlignXForCausalLM, rows: list[list[int]], extra: int = 0, side: str = "right") -> tuple[Tensor, Tensor]:
    """A sum over the rows' tokens, and the drift of each row in the lowest layer."""
    ids, mask = padded(rows, side=side, extra=extra)
    logits = made(ids, mask, use_cache=False).logits
    calibration = alignx_layers(made)[0].calibration
    assert calibration is not None and calibration.last_drift is not None
    return (logits.float().square() * mask.unsqueeze(-1)).sum(), calibration.last_drift


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["choice", "needs"])
def test_rows_beside_padding_train_as_they_do_alone(kind: str, side: str) -> None:
    together, alone = model(kind), model(kind)
    whole, drift = loss(together, ROWS, extra=3, side=side)
    (whole + drift.sum()).backward()
    drifts = []
    for row in ROWS:
        part, own = loss(alone, [row])
        (part + own.sum()).backward()
        drifts.append(own)
    assert relative(drift, torch.cat(drifts)) < 1e-5
    expected = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    for name, p in together.named_parameters():
        if p.requires_grad:
            gradient = expected[name]
            assert p.grad is not None and gradient is not None and bool(gradient.any()), name
            assert relative(p.grad, gradient) < 1e-4, name


def test_the_layers_compute_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], OutputCalibration.forward

    def counted(self: OutputCalibration, y: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(y.shape[0] * y.shape[1])
        return forward(self, y, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(OutputCalibration, "forward", counted)
    made = model("choice")
    loss(made, ROWS, extra=3)
    assert seen and set(seen) == {sum(map(len, ROWS))}


def test_a_batch_of_padding_alone_has_no_gradients() -> None:
    made = model("choice")
    ids, mask = padded(ROWS)
    logits = made(ids, torch.zeros_like(mask), use_cache=False).logits
    assert bool(logits.isfinite().all())
    logits.sum().backward()
    assert not any(
        p.grad is not None and p.grad.any() for layer in alignx_layers(made) for p in layer.mixture.parameters()
    )
