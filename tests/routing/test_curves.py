"""The router's curves against a direct computation over all rows, however they are cut, padded or dispatched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from direct_figures import direct_figures, direct_needs
from tiny_models import aligned, base_model, low_rank_experts, one_hot, padded, random_rows
from torch import Tensor

from alignx_ds.data.batches import Batch, MicroBatch, collate
from alignx_ds.data.encode import Example
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.routing.curves import router_scalars, router_sums, step_scalars
from alignx_ds.training.metrics import MicroBatchLoss, RouterSums, StepMetrics, step_metrics

NAMES = ["generalist", "helpful", "harmless", "honest"]
ROWS = random_rows([5, 14, 7, 9, 3, 11, 8, 6])
EXAMPLES = [Example(tuple(r), n) for r, n in zip(ROWS, [2, 6, 3, 8, 2, 4, 7, 5], strict=True)]
LABELS = [1, 3, 0, 1, 1, 1, 3, 0]  # no row of expert 2, and the halves are unequal in what they hold
CUTS = [[range(8)], [range(4), range(4, 8)], [range(2), range(2, 4), range(4, 6), range(6, 8)]]


@pytest.fixture(scope="module", params=["shared", "per_layer"])
def model(request: pytest.FixtureRequest) -> AlignXForCausalLM:
    base = base_model()
    return aligned(base, low_rank_experts(base), scope=request.param, placement=Placement(1, 0)).train()


def passed(model: AlignXForCausalLM, chosen: range, wide: int = 0) -> MicroBatch:
    """The micro batch of these rows, after its forward pass; `wide`: columns of padding, and lines of it."""
    b = collate([EXAMPLES[i] for i in chosen], 0)
    if wide:
        b = Batch(*(widened(t, wide) for t in (b.input_ids, b.attention_mask, b.prompt_mask, b.labels)))
    labels = torch.tensor([LABELS[i] for i in chosen] + [2] * wide)
    model(b.input_ids, b.attention_mask, b.prompt_mask, use_cache=False)
    return MicroBatch(b, labels, one_hot(labels.tolist()), 1.0)


def widened(t: Tensor, by: int) -> Tensor:
    return torch.nn.functional.pad(t, (by, by, 0, by))


def logged(parts: list[Callable[[], RouterSums]]) -> dict[str, float]:
    """The router's scalars of a step with these micro batches."""
    metrics, _ = step_metrics([MicroBatchLoss(torch.zeros(()), {}, part) for part in parts], stop=False)
    assert metrics.router is not None
    return router_scalars(NAMES, metrics.router)


def direct(model: AlignXForCausalLM) -> dict[str, float]:
    """From the decisions of one pass over all rows, prompts alone."""
    ids, mask = padded([r[: e.prompt_length] for r, e in zip(ROWS, EXAMPLES, strict=True)])
    with torch.no_grad():
        model(ids, mask, use_cache=False)
    decisions = list(model.routing.decisions.values())
    return direct_figures([d.logits.softmax(-1).tolist() for d in decisions], LABELS, NAMES)


@pytest.mark.parametrize("cut", CUTS, ids=len)
def test_the_metrics_of_a_step_are_those_of_all_its_rows(model: AlignXForCausalLM, cut: list[range]) -> None:
    made = logged([router_sums(model, passed(model, chosen)) for chosen in cut])
    assert made.pop("router/padding") == 0, "in training every expert gets every token of this rank"
    assert made == pytest.approx(direct(model), abs=1e-5)
    assert "router/own/harmless" not in made, "it has no row here"


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_the_metrics_of_needs_are_those_of_its_axes(scope: str) -> None:
    """Rows that need none, one or two axes, in a step of two micro batches of four."""
    base = base_model()
    model = aligned(base, low_rank_experts(base), scope=scope, kind="needs", placement=Placement(1, 0)).train()
    sets = one_hot(LABELS)
    sets[3, 3] = sets[6, 1] = 1
    odds: list[list[list[float]]] = []
    parts = []
    for chosen in CUTS[1]:
        part = replace(passed(model, chosen), needs=sets[list(chosen)])
        seen = [(d.logits[:, 1:] - d.logits[:, :1]).tolist() for d in model.routing.decisions.values()]
        odds = [a + b for a, b in zip(odds, seen, strict=True)] if odds else seen
        parts.append(router_sums(model, part))
    made = logged(parts)
    made.pop("router/padding")
    assert made == pytest.approx(direct_needs(odds, sets.int().tolist(), NAMES), abs=1e-5)


@pytest.mark.parametrize("cut", CUTS, ids=len)
def test_padding_changes_no_metric(model: AlignXForCausalLM, cut: list[range]) -> None:
    plain = logged([router_sums(model, passed(model, chosen)) for chosen in cut])
    padded = logged([router_sums(model, passed(model, chosen, wide=3)) for chosen in cut])
    assert padded == pytest.approx(plain, abs=1e-5)


def test_padding_is_a_share_of_all_dispatched_slots(model: AlignXForCausalLM) -> None:
    """Not the mean of the layers' shares, nor that of the micro batches'."""
    part = passed(model, range(4))
    parts = []
    for slots, empty in ((100, 0.5), (20, 0.0)):
        for layer in alignx_layers(model):
            assert isinstance(layer.mixture, ParallelMixture)
            layer.mixture.dispatch.slots, layer.mixture.dispatch.padding_fraction = slots, empty
        parts.append(router_sums(model, part))
    assert logged(parts)["router/padding"] == pytest.approx(50 / 120)


def test_serving_the_best_expert_leaves_slots_empty(model: AlignXForCausalLM) -> None:
    """One row at a time: one expert has all its tokens, the others' slots are empty."""
    model.eval()
    sums = router_sums(model, passed(model, range(1, 2), wide=2))
    model.train()
    assert logged([sums])["router/padding"] == pytest.approx(1 - 1 / len(NAMES))


def test_without_a_dispatch_no_padding_is_logged() -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base)).train()
    assert "router/padding" not in logged([router_sums(model, passed(model, range(4)))])


def test_loss_and_terms_are_logged_beside_the_router(model: AlignXForCausalLM) -> None:
    sums = router_sums(model, passed(model, range(8)))
    shown = step_scalars(NAMES, StepMetrics(1.5, {"lm": 0.5}, sums()))
    assert shown == {"loss": 1.5, "lm": 0.5} | router_scalars(NAMES, sums())
    assert step_scalars(NAMES, StepMetrics(1.5, {})) == {"loss": 1.5}


def test_non_finite_gates_give_no_metrics(model: AlignXForCausalLM) -> None:
    part = passed(model, range(8))
    for layer, decision in model.routing.decisions.items():
        logits = decision.logits.detach().clone()
        logits[2] = torch.nan
        model.routing.decisions[layer] = replace(decision, logits=logits)
    assert logged([router_sums(model, part)]) == {}
