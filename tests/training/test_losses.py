"""The losses against numpy, and their independence of how a global batch is cut into micro batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy
from tiny_models import (
    ALIGNX_LAYERS,
    FAMILIES,
    VOCABULARY,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    one_hot,
    random_rows,
    relative,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from whole_logits import answer_nll

from alignx_ds.config.schema import AlignConfig
from alignx_ds.data.batches import IGNORED, Batch, MicroBatch, collate, pack
from alignx_ds.data.encode import Example
from alignx_ds.mocae.gate import Query
from alignx_ds.mocae.layer import freeze_trunk, gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.runtime import attention
from alignx_ds.training import losses
from alignx_ds.training.losses import AlignTerms, align_terms, gating_terms, language_loss

TERMS = ("lm", "gating", "drift", "entropy", "prior")
PATHS: dict[str, tuple[Placement | None, str]] = {  # where the experts are, and the kind of the gate
    "fused": (None, "choice"),
    "parallel": (Placement(1, 0), "choice"),
    "needs": (None, "needs"),
}
EXAMPLES = [Example(tuple(r), p) for r, p in zip(random_rows([5, 14, 7, 9]), [2, 6, 3, 8], strict=True)]
LABELS = torch.tensor([1, 3, 0, 1])
ANSWER_TOKENS = sum(e.answer_length for e in EXAMPLES)


def make(path: str = "fused", scope: str = "per_layer") -> AlignXForCausalLM:
    base = base_model()
    placement, kind = PATHS[path]
    model = aligned(base, low_rank_experts(base), scope=scope, placement=placement, kind=kind)
    freeze_trunk(model)
    return model.train()


def terms_of(model: AlignXForCausalLM, b: Batch, experts: Tensor, lm_scale: float) -> AlignTerms:
    logits = model(b.input_ids, b.attention_mask, b.prompt_mask, use_cache=False).logits
    return align_terms(model, answer_nll(logits, b.labels), one_hot(experts.tolist()), lm_scale)


def test_answer_nll_sums_over_the_answers_tokens_only() -> None:
    batch = collate(EXAMPLES, pad_id=0)
    logits = 3 * torch.randn(*batch.labels.shape, VOCABULARY, generator=generator(1))
    log_p = log_softmax(logits.double().numpy(), axis=-1)
    expected = 0.0
    for i, example in enumerate(EXAMPLES):
        for t in range(example.prompt_length, len(example.ids)):
            expected -= log_p[i, t - 1, example.ids[t]]
    assert float(answer_nll(logits, batch.labels)) == pytest.approx(expected, rel=1e-5)
    assert float(answer_nll(logits.bfloat16(), batch.labels)) == pytest.approx(expected, rel=2e-2)
    assert float(answer_nll(logits, torch.full_like(batch.labels, IGNORED))) == 0.0


ATTENTION = [(family, how) for family in FAMILIES for how in ("sdpa", "eager") if (family, how) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("family", "implementation"), ATTENTION)
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(family: str, implementation: str) -> None:
    """Also in one line, which flash attention needs. The window of some families is shorter than a line, so rows on it
    must not see each other there either.
    """
    model, scale = base_model(family=family), 1 / ANSWER_TOKENS
    attention.choose(model, implementation)
    assert model.config._attn_implementation == implementation
    padded, packed = collate(EXAMPLES, 0), pack(EXAMPLES, 0)
    assert 1 < packed.input_ids.shape[0] < len(EXAMPLES), "otherwise nothing is packed, or all of it in one line"
    found = [
        language_loss(model, MicroBatch(batch, LABELS, one_hot(LABELS.tolist()), scale)).loss
        for batch in (padded, packed, packed.in_one_line())
    ]
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) for loss in found
    ]
    for loss, gradient in zip(found[1:], gradients[1:], strict=True):
        assert float(loss.detach()) == pytest.approx(float(found[0].detach()), rel=1e-5)
        assert relative(gradient, gradients[0]) < 1e-4


def test_flash_attention_gets_packed_rows_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would let the rows of several lines see each other (transformers' _is_packed_sequence)."""
    model, shapes = base_model(), []
    monkeypatch.setattr(attention, "reads_one_line", lambda m: m is model)
    model.register_forward_pre_hook(lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    for batch in (collate(EXAMPLES, 0), pack(EXAMPLES, 0)):
        language_loss(model, MicroBatch(batch, LABELS, one_hot(LABELS.tolist()), 1.0))
    lines = pack(EXAMPLES, 0).input_ids
    assert shapes == [collate(EXAMPLES, 0).input_ids.shape, (1, lines.numel())]
    monkeypatch.undo()
    assert not attention.reads_one_line(model)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", attention.FLASH)
    assert attention.reads_one_line(model)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])  # the second caps its logits
def test_in_pieces_the_loss_and_its_gradient_are_the_same(
    monkeypatch: pytest.MonkeyPatch, family: str, form: str, tied: bool
) -> None:
    model, found = base_model(tied=tied, family=family), []
    part = MicroBatch(collate(EXAMPLES, 0) if form == "padded" else pack(EXAMPLES, 0), LABELS, one_hot([0] * 4), 0.1)
    for most in (2**28, 3 * VOCABULARY):
        monkeypatch.setattr(losses, "MOST_LOGITS", most)
        loss = language_loss(model, part).loss
        parameters = list(model.parameters())
        found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for pieces, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert not model.lm_head._forward_pre_hooks, "what selects the answers' tokens does so in training alone"


@pytest.mark.parametrize("most", [2**28, 3 * VOCABULARY], ids=["whole", "in_pieces"])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, family: str, most: int) -> None:
    """Also where a model caps its logits, which transformers does after the head."""
    monkeypatch.setattr(losses, "MOST_LOGITS", most)
    model, batch = base_model(family=family), collate(EXAMPLES, 0)
    with torch.no_grad():
        loss = language_loss(model, MicroBatch(batch, LABELS, one_hot([0] * 4), 1 / ANSWER_TOKENS)).loss
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_the_gradient_is_that_of_the_logits_of_all_tokens(form: str) -> None:
    """Though the head computes only those that predict an answer's token."""
    model, rows = base_model(), []
    batch = collate(EXAMPLES, 0) if form == "padded" else pack(EXAMPLES, 0)
    parameters = list(model.parameters())
    noted = model.lm_head.register_forward_hook(lambda _, args, logits: rows.append(logits.shape[:2]))
    loss = language_loss(model, MicroBatch(batch, LABELS, one_hot([0] * 4), 1.0)).loss
    noted.remove()
    _, inputs = losses.model_inputs(model, batch)
    whole = answer_nll(model(**inputs).logits, batch.labels)
    assert rows == [(1, ANSWER_TOKENS)]
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    for own, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-7)


class Fp32Logits(TorchDispatchMode):
    """Notes how many rows of logits the largest fp32 tensor of the vocabulary's width has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize(("most", "rows"), [(2**28, ANSWER_TOKENS), (3 * VOCABULARY, 3)])
def test_in_bf16_no_more_logits_are_in_fp32_than_allowed(monkeypatch: pytest.MonkeyPatch, most: int, rows: int) -> None:
    """In the forward and in the backward pass."""
    monkeypatch.setattr(losses, "MOST_LOGITS", most)
    model = base_model().to(torch.bfloat16)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and tensor.shape[-1:] == (VOCABULARY,):
            kept.append(tensor)
        return tensor

    with Fp32Logits() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = language_loss(model, MicroBatch(collate(EXAMPLES, 0), LABELS, one_hot([0] * 4), 0.1)).loss
        loss.backward()
    assert seen.rows == rows
    assert bool(kept) == (most > 3 * VOCABULARY), "the backward pass makes them anew"


def some_query() -> Query:
    return Query(torch.randn(4, 4 * 32, generator=generator(2)), torch.randn(4, 4, generator=generator(3)))


def test_the_gating_terms() -> None:
    model = make(scope="shared")
    gate = gates_of(model)[ALIGNX_LAYERS[0]]
    query = some_query()
    decision = gate(query)
    cross_entropy, uncertainty, prior = gating_terms(gate, query, decision, one_hot(LABELS.tolist()))
    log_p = log_softmax(decision.logits.detach().double().numpy(), axis=-1)
    parts = {name: t.detach().double().numpy() for name, t in gate.parts(query).items()}
    log_q = log_softmax(parts["fractal"] + parts["natural"] + parts["lexical"], axis=-1)
    assert float(cross_entropy) == pytest.approx(-np.mean([log_p[i, e] for i, e in enumerate(LABELS)]), rel=1e-4)
    assert float(uncertainty) == pytest.approx(entropy(np.exp(log_p), axis=-1).mean(), rel=1e-4)
    assert float(prior) == pytest.approx(entropy(np.exp(log_p), np.exp(log_q), axis=-1).mean(), rel=1e-3)
    for term in (cross_entropy, uncertainty, prior):
        (gradient,) = torch.autograd.grad(term, gate.router.weight, retain_graph=True)
        assert gradient.any()


def test_the_prior_is_zero_where_the_router_adds_nothing() -> None:
    gate = gates_of(make(scope="shared"))[ALIGNX_LAYERS[0]]
    with torch.no_grad():
        for parameter in gate.router.parameters():
            parameter.zero_()
    query = some_query()
    assert float(gating_terms(gate, query, gate(query), one_hot(LABELS.tolist()))[2].detach()) == pytest.approx(
        0.0, abs=1e-6
    )


def test_the_align_terms_average_over_gates_and_layers() -> None:
    model = make()
    terms = terms_of(model, collate(EXAMPLES, 0), LABELS, lm_scale=0.25)
    routing = model.routing
    per_gate = [
        [
            float(t.detach())
            for t in gating_terms(gate, routing.queries[i], routing.decisions[i], one_hot(LABELS.tolist()))
        ]
        for i, gate in gates_of(model).items()
    ]
    assert len(per_gate) == 2
    found = [float(t.detach()) for t in (terms.gating, terms.entropy, terms.prior)]
    np.testing.assert_allclose(found, np.mean(per_gate, axis=0), rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_without_output_calibration_the_drift_is_zero_and_the_rest_is_trained(path: str) -> None:
    base, (placement, kind) = base_model(), PATHS[path]
    model = aligned(base, low_rank_experts(base), placement=placement, kind=kind, output_latent=0).train()
    freeze_trunk(model)
    terms = terms_of(model, collate(EXAMPLES, 0), LABELS, lm_scale=0.25)
    assert float(terms.drift) == 0.0
    terms.total(AlignConfig(drift=1.0)).backward()
    (gate,) = gates_of(model).values()
    assert gate.router.weight.grad is not None and gate.router.weight.grad.any()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_the_total_weighs_every_term() -> None:
    values = {name: torch.tensor(float(10**i)) for i, name in enumerate(TERMS)}
    weights = AlignConfig(gating=2.0, drift=3.0, entropy=4.0, prior=5.0)
    terms = AlignTerms(**values)
    assert float(terms.total(weights)) == 1 + 2 * 10 + 3 * 100 + 4 * 1000 + 5 * 10000
    assert terms.scalars() == {name: float(v) for name, v in values.items()}


def gradient(model: AlignXForCausalLM, loss: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in filled])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("term", TERMS)
def test_the_mean_over_micro_batches_is_the_term_of_the_global_batch(term: str, path: str) -> None:
    """As DeepSpeed averages over ranks and accumulation steps; the parts are padded to different lengths."""
    model = make(path)
    whole = getattr(terms_of(model, collate(EXAMPLES, 0), LABELS, 1 / ANSWER_TOKENS), term)
    expected = gradient(model, whole)
    parts, gradients = [], []
    for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        terms = terms_of(model, collate(EXAMPLES[part], 0), LABELS[part], 4 / ANSWER_TOKENS)
        parts.append(float(getattr(terms, term).detach()))
        gradients.append(gradient(model, getattr(terms, term)))
    assert float(whole.detach()) != 0.0
    assert np.mean(parts) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert relative(torch.stack(gradients).mean(0), expected) < 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_term_depends_on_the_padding(path: str, side: str) -> None:
    model = make(path)
    plain = terms_of(model, collate(EXAMPLES[:1], 0), LABELS[:1], 1.0)
    wide = collate([EXAMPLES[0], EXAMPLES[1]], 0, side)
    one_row = Batch(wide.input_ids[:1], wide.attention_mask[:1], wide.prompt_mask[:1], wide.labels[:1])
    padded = terms_of(model, one_row, LABELS[:1], 1.0)
    for name, value in plain.scalars().items():
        assert float(padded.scalars()[name]) == pytest.approx(float(value), rel=1e-4), name
