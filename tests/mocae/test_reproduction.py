"""Specialists are reproduced, and both execution paths compute one function, here in one process (invariants 1, 3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    DENSE,
    EXPERTS,
    aligned,
    base_model,
    exact_experts,
    factor_gradients,
    generator,
    low_rank_experts,
    one_hot,
    padded,
    random_changes,
    random_rows,
    relative,
    specialist,
)
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.experts.low_rank import TaskFeatures
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.layer import alignx_layers, freeze_trunk
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.parallel import ParallelMixture

PATHS = {"fused": None, "parallel": Placement(1, 0)}
BASES: dict[str, dict[str, Any]] = {family: {"family": family} for family in DENSE}
BASES["llama-biased"] = {"family": "llama", "mlp_bias": True}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return base_model(**BASES[request.param])


def on_every_base(*some: tuple[object, ...], llama: list[tuple[object, ...]]) -> list[Any]:
    """Parameters (base, …): `some` on every base, and more of them on the default one."""
    cases = [(name, *case) for name in BASES for case in some] + [("llama", *case) for case in llama]
    return [pytest.param(*case, id="-".join(map(str, case))) for case in cases]


@pytest.mark.parametrize(
    ("base", "path", "training", "scope"),
    on_every_base(
        ("fused", False, "shared"),
        ("parallel", True, "per_layer"),
        llama=[("fused", True, "per_layer"), ("parallel", False, "shared")],
    ),
    indirect=["base"],
)
@torch.no_grad()
def test_a_forced_expert_is_its_specialist(base: PreTrainedModel, path: str, training: bool, scope: str) -> None:
    changes = random_changes(base)
    model = aligned(base, exact_experts(changes), scope=scope, placement=PATHS[path], trained=False).train(training)
    ids, mask = padded(random_rows([5, 11, 8]))
    references = [specialist(base, changes, e)(ids, attention_mask=mask).logits[mask.bool()] for e in range(EXPERTS)]
    for e in range(EXPERTS):
        logits = model(ids, mask, forced=one_hot([e] * 3)).logits[mask.bool()]
        errors = [relative(logits, other) for other in references]
        assert errors[e] <= 1e-5
        assert min(errors[:e] + errors[e + 1 :]) > 0.1
    mixed = model(ids, mask, forced=one_hot([2, 0, 3])).logits
    for row, e in enumerate([2, 0, 3]):
        alone = specialist(base, changes, e)(ids, attention_mask=mask).logits
        assert relative(mixed[row][mask[row].bool()], alone[row][mask[row].bool()]) <= 1e-5


@torch.no_grad()
def test_stage_1_s_full_rank_factors_reproduce_the_specialist(base: PreTrainedModel) -> None:
    changes = random_changes(base)
    source = generator(9)
    experts: dict[int, list[Factors]] = {}
    for layer, by_expert in changes.items():
        experts[layer] = []
        for change in by_expert:
            low_rank = {}
            for p in PROJECTIONS:
                features = TaskFeatures(change[p])
                features.add(torch.randn(20, change[p].shape[1], generator=source))  # fewer rows than dimensions
                low_rank[p] = features.factor(rank=0)
            experts[layer].append(
                Factors({p: f.down for p, f in low_rank.items()}, {p: f.up for p, f in low_rank.items()})
            )
    model = aligned(base, experts, trained=False)
    ids, mask = padded(random_rows([7, 7]))
    for e in range(EXPERTS):
        reference = specialist(base, changes, e)(ids, attention_mask=mask).logits
        assert relative(model(ids, mask, forced=one_hot([e, e])).logits, reference) <= 1e-5


def gradients(model: AlignXForCausalLM) -> dict[str, Tensor]:
    """Of routers, calibrations and (by global expert, summed into the fused path's shapes) the factors."""
    found: dict[str, Tensor] = {}
    for index, layer in zip(ALIGNX_LAYERS, alignx_layers(model), strict=True):
        named = {f"{index}.calibration.{n}": p for n, p in layer.calibration.named_parameters()}
        if layer.gate is not None:
            named[f"{index}.router"] = layer.gate.router.weight
        for name, parameter in named.items():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if isinstance(layer.mixture, ParallelMixture):
            experts = layer.mixture.local_experts()
            for p in PROJECTIONS:
                found[f"{index}.down.{p}"] = torch.cat([e.down[p].grad for e in experts])
                found[f"{index}.up.{p}"] = torch.cat([e.up[p].grad for e in experts], dim=1)
        if isinstance(layer.mixture, FusedMixture):
            found |= {f"{index}.{name}": g for name, g in factor_gradients(layer.mixture).items()}
    return found


@pytest.mark.parametrize(
    ("base", "training", "top_k", "scope"),
    on_every_base(
        (False, 1, "per_layer"),
        (True, 1, "shared"),
        llama=[(False, 1, "shared"), (False, 2, "per_layer"), (False, 3, "shared"), (True, 1, "per_layer")],
    ),
    indirect=["base"],
)
def test_both_paths_are_one_function(base: PreTrainedModel, training: bool, top_k: int, scope: str) -> None:
    ids, mask = padded(random_rows([5, 12, 8]))
    cotangent = torch.randn(3, ids.shape[1], 50, generator=generator(8)) * mask.unsqueeze(-1)
    logits, grads, decisions = [], [], []
    for placement in PATHS.values():
        model = aligned(base, low_rank_experts(base), scope=scope, top_k=top_k, placement=placement).train(training)
        freeze_trunk(model)
        out = model(ids, mask).logits
        (out * cotangent).sum().backward()
        logits.append(out.detach()[mask.bool()])
        grads.append(gradients(model))
        decisions.append(model.routing.decisions[ALIGNX_LAYERS[0]].gates.detach())
    assert (decisions[0] > 0).sum(-1).tolist() == [4 if training else top_k] * 3
    assert relative(logits[1], logits[0]) < 1e-5
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        if "router" in name and not training and top_k == 1:  # a lone gate is always one: nothing but rounding is left
            assert max(float(expected.abs().max()), float(grads[1][name].abs().max())) < 1e-5
            continue
        assert expected.any(), name
        assert relative(grads[1][name], expected) < 1e-4, name


@pytest.mark.parametrize(("base", "training"), on_every_base((False,), llama=[(True,)]), indirect=["base"])
@torch.no_grad()
def test_forced_soft_gates_mean_the_same_on_both_paths(base: PreTrainedModel, training: bool) -> None:
    """Forced gates overrule the gates, whatever top_k the gates themselves would keep."""
    ids, mask = padded(random_rows([6, 6]))
    forced = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0]])
    made = [
        aligned(base, low_rank_experts(base), placement=placement).train(training)(ids, mask, forced=forced).logits
        for placement in PATHS.values()
    ]
    assert relative(made[1], made[0]) < 1e-5


@torch.no_grad()
def test_the_fused_state_of_a_parallel_model_is_the_fused_model(base: PreTrainedModel) -> None:
    parallel = aligned(base, low_rank_experts(base), placement=PATHS["parallel"])
    fused = aligned(base, low_rank_experts(base, seed=99), trained=False)
    fused.load_state_dict(parallel.fused_state(), strict=True)
    ids, mask = padded(random_rows([6, 9]))
    assert relative(fused(ids, mask).logits[mask.bool()], parallel(ids, mask).logits[mask.bool()]) < 1e-5


def test_only_what_stage_2_trains_is_left_trainable(base: PreTrainedModel) -> None:
    model = aligned(base, low_rank_experts(base))
    freeze_trunk(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = (".mixture.", ".calibration.", ".gate.router.")
    assert trainable == {n for n, _ in model.named_parameters() if any(part in n for part in parts)}
    assert any("router" in n for n in trainable) and not any(".ffn." in n for n in trainable)
