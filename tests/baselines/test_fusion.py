"""The mixture of full FFN copies: two executions of one function, and that function against what defines it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    FFN,
    HIDDEN,
    base_model,
    generator,
    padded,
    random_changes,
    random_rows,
    relative,
    specialist,
    table_of,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from alignx_ds.baselines import fusion
from alignx_ds.baselines.fusion import ALL, H3FUSION, TRINITYX, FullExperts, FusionSettings, replace_ffns
from alignx_ds.mocae.experts import PROJECTIONS, FeedForward

EXPERTS = 3
TOP1 = FusionSettings(top_k=1, temperature=0.5, scaled=True)
SPARSE_AND_SCALED = FusionSettings(top_k=2, temperature=2.0, scaled=True)
DENSE = replace(H3FUSION, top_k=ALL)
EVERY = [H3FUSION, TRINITYX, TOP1, SPARSE_AND_SCALED, DENSE]


def feed_forward(seed: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> FeedForward:
    """Random weights; biases on all projections, or on none."""
    torch.manual_seed(seed)
    gate, up = (nn.Linear(HIDDEN, FFN, bias, dtype=dtype) for _ in range(2))
    return FeedForward(gate, up, nn.Linear(FFN, HIDDEN, bias, dtype=dtype), nn.SiLU())


def answer(ffn: FeedForward, x: Tensor) -> Tensor:
    return ffn.down(ffn.activation(ffn.gate(x)) * ffn.up(x))  # type: ignore[no-any-return]


def mixture(settings: FusionSettings, grouped: bool = True, bias: bool = False, **kind: Any) -> FullExperts:
    """Three experts with clear preferences of the gate, and γ far from one."""
    made = FullExperts([feed_forward(n, bias, **kind) for n in range(EXPERTS)], settings, grouped)
    with torch.no_grad():
        made.gate.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator(5)))
        if made.gamma is not None:
            made.gamma.copy_(torch.tensor([0.5, 1.5, 2.0]))
    return made


def tokens(rows: int = 4, length: int = 30, seed: int = 6) -> Tensor:
    return torch.randn(rows, length, HIDDEN, generator=generator(seed))


def by_definition(made: FullExperts, experts: list[FeedForward], x: Tensor) -> Tensor:
    """Token by token, in double precision."""
    gates = (x.double() @ made.gate.weight.double().T / made.settings.temperature).softmax(-1)
    out = torch.zeros_like(x, dtype=torch.double)
    doubles = [copy.deepcopy(e) for e in experts]
    for e in doubles:
        for p in PROJECTIONS:
            e.projection(p).double()
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        at = tuple(place)
        best = gates[at].argsort(descending=True)[: made.settings.top_k or EXPERTS]
        total = gates[at][best].sum()
        for i in best.tolist():
            gamma = float(made.gamma[i]) if made.gamma is not None else 1.0
            out[at] += gates[at][i] / total * gamma * answer(doubles[i], x[at].double())
    return out


@pytest.mark.parametrize(("settings", "bias"), [*((settings, True) for settings in EVERY), (H3FUSION, False)])
@pytest.mark.parametrize("grouped", [True, False])
@torch.no_grad()
def test_every_execution_computes_the_definition(settings: FusionSettings, bias: bool, grouped: bool) -> None:
    made = mixture(settings, grouped, bias)
    experts = [feed_forward(n, bias) for n in range(EXPERTS)]
    for x in (tokens(4, 30), tokens(2, 3), tokens(1, 1)):  # slices, one GEMM, and a single token
        assert relative(made(x), by_definition(made, experts, x)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [*((settings, torch.float32) for settings in EVERY), (H3FUSION, torch.bfloat16), (TRINITYX, torch.bfloat16)],
)
@pytest.mark.parametrize("length", [3, 40])
def test_loop_and_grouped_agree_forward_and_backward(settings: FusionSettings, dtype: torch.dtype, length: int) -> None:
    grouped, looped = mixture(settings, True, dtype=dtype), mixture(settings, False, dtype=dtype)
    x = tokens(4, length).to(dtype)
    cotangent = tokens(4, length, seed=8).to(dtype)
    found = []
    for made in (grouped, looped):
        given = x.clone().requires_grad_()
        out = made(given)
        out.backward(cotangent)
        gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        found.append({"y": out.detach(), "x": given.grad, **gradients})
    assert found[0].keys() == found[1].keys()
    assert {"weights.gate", "weights.up", "weights.down"} <= found[0].keys()
    for name, expected in found[1].items():
        if float(expected.abs().max()) > 1e-6:  # a lone expert's renormalised gate has no gradient but rounding
            assert relative(found[0][name], expected) < (2e-5 if dtype == torch.float32 else 3e-2), name


@pytest.mark.parametrize("settings", [H3FUSION, TOP1])
def test_the_weighted_sum_for_gradients_is_embedding_bag_s(
    settings: FusionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where embedding_bag has no gradient in bf16."""
    calls = []

    def bag(back: Tensor, answers: Tensor, *, per_sample_weights: Tensor, mode: str) -> Tensor:
        calls.append(mode)
        return fusion.weighted_sum(answers, back.flatten(), per_sample_weights)

    found = []
    for _ in range(2):
        made, x = mixture(settings, bias=True), tokens(2, 40).requires_grad_()
        out = made(x)
        out.backward(tokens(2, 40, seed=8))
        assert x.grad is not None and made.gate.weight.grad is not None
        found.append([out.detach(), x.grad, made.gate.weight.grad, *(w.grad for w in made.weights.values())])
        monkeypatch.setattr(functional, "embedding_bag", bag)
    assert calls == ["sum"]
    for ours, theirs in zip(*found, strict=True):
        if float(theirs.abs().max()) > 1e-6:  # a lone expert's renormalised gate has no gradient but rounding
            assert relative(ours, theirs) < 2e-5


@pytest.mark.parametrize("settings", [H3FUSION, TOP1])
def test_without_a_grouped_gemm_slices_take_its_place(
    settings: FusionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = mixture(settings, bias=True), tokens(2, 5)
    expected = made(x)
    monkeypatch.setattr(fusion, "GROUPED_MM", None)
    assert relative(made(x), expected) < 1e-6


@torch.no_grad()
def test_an_expert_without_tokens_changes_nothing() -> None:
    for length in (3, 40):
        x = tokens(2, length).abs()
        results = []
        for grouped in (True, False):
            made = mixture(TOP1, grouped)
            made.gate.weight.copy_(torch.stack([torch.zeros(HIDDEN), torch.ones(HIDDEN), -torch.ones(HIDDEN)]))
            results.append(made(x))
        assert relative(results[0], 1.5 * answer(feed_forward(1), x)) < 1e-5  # all to expert 1, whose γ is 1.5
        assert relative(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("settings", EVERY)
@torch.no_grad()
def test_identical_experts_are_that_expert_whatever_the_gate(settings: FusionSettings) -> None:
    ffn = feed_forward(0)
    made = FullExperts([ffn] * EXPERTS, settings)
    made.gate.weight.normal_(std=3.0)
    assert relative(made(tokens()), answer(ffn, tokens())) < 1e-5


@torch.no_grad()
def test_gamma_scales_its_own_expert() -> None:
    made = mixture(TRINITYX)
    assert made.gamma is not None
    made.gamma.fill_(1.0)
    plain = made(tokens())
    made.gamma.copy_(torch.tensor([1.0, 3.0, 1.0]))
    gates = (tokens() @ made.gate.weight.T / TRINITYX.temperature).softmax(-1)
    share = gates[..., 1:2] * answer(feed_forward(1), tokens())
    assert relative(made(tokens()), plain + 2 * share) < 1e-5


def test_h3fusion_has_no_gamma_and_trinityx_starts_at_one() -> None:
    experts = [feed_forward(0)] * EXPERTS
    assert FullExperts(experts, H3FUSION).gamma is None
    assert FullExperts(experts, TRINITYX).gamma.tolist() == [1.0] * EXPERTS  # type: ignore[union-attr]
    assert (FullExperts(experts, H3FUSION).top_k, FullExperts(experts, TRINITYX).top_k) == (2, EXPERTS)
    assert FullExperts(experts[:1], H3FUSION).top_k == 1, "no more than there are"


def test_the_experts_are_copies() -> None:
    ffn = feed_forward(0)
    made = FullExperts([ffn, ffn], H3FUSION)
    with torch.no_grad():
        made.weights["gate"][0].zero_()
    assert ffn.gate.weight.abs().min() > 0 and made.weights["gate"][1].abs().max() > 0


def test_the_gate_is_computed_in_full_precision() -> None:
    """Logits that bfloat16 can't tell apart still choose."""
    made = mixture(replace(H3FUSION, top_k=1), dtype=torch.bfloat16).train()
    made(tokens().bfloat16())
    assert made.logits is not None and made.logits.dtype == torch.float32
    expected = functional.linear(tokens().bfloat16().float(), made.gate.weight).flatten(0, 1)
    assert torch.equal(made.logits, expected)


def test_logits_are_kept_in_training_only() -> None:
    made = mixture(H3FUSION).train()
    made(tokens(2, 5))
    assert made.logits is not None and made.logits.shape == (10, EXPERTS) and made.logits.requires_grad
    made.eval()(tokens(2, 5))
    assert made.logits is None


def fused(base: PreTrainedModel, settings: FusionSettings, grouped: bool = True) -> PreTrainedModel:
    """The base model with its specialists' FFNs side by side; the gate spreads tokens over all experts."""
    model, changes, table = copy.deepcopy(base), random_changes(base), table_of(base)
    specialists = [specialist(base, changes, n) for n in (1, 2, 3)]

    def make(layer: int, ffn: FeedForward) -> FullExperts:
        return FullExperts([table.view(table.ffn_of(s, layer)) for s in specialists], settings, grouped)

    for block in replace_ffns(model, table, ALIGNX_LAYERS, make).values():
        block.gate.weight.data.normal_(std=1.0, generator=generator(9))
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "grouped", "family"),
    [(H3FUSION, True, "llama"), (H3FUSION, False, "qwen3"), (TRINITYX, True, "gemma"), (TRINITYX, False, "llama")],
)
@torch.no_grad()
def test_a_forced_gate_is_that_specialist(settings: FusionSettings, grouped: bool, family: str) -> None:
    base = base_model(family=family)
    model = fused(base, settings, grouped)
    ids = torch.tensor(random_rows([20] * 4))
    free = model(ids).logits
    for number in range(EXPERTS):
        for block in fusion.fusion_layers(model):
            block.forced = number
        expected = specialist(base, random_changes(base), number + 1)(ids).logits
        assert relative(model(ids).logits, expected) < 1e-5
        assert relative(free, expected) > 1e-3


@pytest.mark.parametrize("settings", [H3FUSION, TRINITYX])
@torch.no_grad()
def test_a_row_depends_neither_on_its_neighbours_nor_on_padding(settings: FusionSettings) -> None:
    model = fused(base_model(), settings)
    rows = random_rows([12, 30, 25, 4])
    for side in ("left", "right"):
        ids, mask = padded(rows, side, extra=3)
        logits = model(ids, mask).logits
        for number, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            assert relative(logits[number][mask[number].bool()], alone) < 1e-5


@torch.no_grad()
def test_generation_is_the_forward_pass_token_by_token() -> None:
    model = fused(base_model(), H3FUSION)
    ids, mask = padded(random_rows([6, 9]), "left")
    made = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    whole = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
    expected = model(made, whole).logits[:, -7:-1].argmax(-1)
    assert torch.equal(made[:, -6:], expected)


def test_surgery_touches_the_chosen_layers_alone() -> None:
    base = base_model()
    model, table = copy.deepcopy(base), table_of(base)
    made = replace_ffns(model, table, [1], lambda _, ffn: FullExperts([ffn] * 2, H3FUSION))
    assert list(made) == [1] and fusion.fusion_layers(model) == [made[1]]
    for layer in (0, 2):
        assert not isinstance(table.ffn_of(model, layer), FullExperts)
    ids = torch.tensor(random_rows([8]))
    assert relative(model.eval()(ids).logits, base(ids).logits) < 1e-5
