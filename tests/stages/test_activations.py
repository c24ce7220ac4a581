"""Activation checkpointing: the gradients and the state left behind are those without it, and less is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import process_group
from tiny_models import (
    ALIGNX_LAYERS,
    HIDDEN,
    LAYERS,
    MIXTURES,
    TABLE,
    VOCABULARY,
    aligned,
    attention_experts,
    base_model,
    low_rank_experts,
    one_hot,
    random_rows,
    tiny_config,
)
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from whole_logits import answer_nll

from alignx_ds.baselines.fusion import H3FUSION, TRINITYX, FullExperts, FusionSettings, fusion_layers, replace_ffns
from alignx_ds.config.schema import AlignConfig, AxisConfig, FusionConfig, ModelConfig, RunConfig, SpecialistConfig
from alignx_ds.data.batches import MicroBatch, collate, pack
from alignx_ds.data.encode import Example
from alignx_ds.mocae.layer import freeze_trunk, output_calibrations
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.models.base import BaseModel, Planned
from alignx_ds.models.shapes import shape
from alignx_ds.plan.zero import Zero, model_of
from alignx_ds.runtime import attention
from alignx_ds.stages import align, fuse
from alignx_ds.stages.activations import MOST, Activations, Ffn, recompute
from alignx_ds.training import engine as engines
from alignx_ds.training import losses
from alignx_ds.training.losses import align_terms, language_loss
from alignx_ds.training.metrics import MicroBatchLoss

LABELS = [1, 3, 0, 1]
EXAMPLES = [Example(tuple(r), p) for r, p in zip(random_rows([5, 14, 7, 9]), [2, 6, 3, 8], strict=True)]
TERMS = ("lm", "gating", "drift", "entropy", "prior")
Loss = Callable[[Any, MicroBatch], MicroBatchLoss]


def part(*, packed: bool = False) -> MicroBatch:
    batch = pack(EXAMPLES, 0) if packed else collate(EXAMPLES, 0)
    return MicroBatch(batch, torch.tensor(LABELS), one_hot(LABELS), 0.1)


def mixture(gate: str, calibrated: bool = True) -> AlignXForCausalLM:
    base, scope = base_model(), "shared" if gate == "needs" else "per_layer"
    size = {} if calibrated else {"output_latent": 0}
    model = aligned(base, low_rank_experts(base), scope=scope, kind=gate, **size)
    freeze_trunk(model)
    return model.train()


def fusion(settings: FusionSettings) -> nn.Module:
    model = base_model(attention_dropout=0.3)  # its random numbers have to be the same in the second run
    torch.manual_seed(5)

    def make(layer: int, ffn: Any) -> FullExperts:
        made = FullExperts([ffn] * 3, settings)
        with torch.no_grad():
            for weight in made.weights.values():
                weight.add_(0.1 * torch.randn_like(weight))
        return made

    replace_ffns(model, TABLE, ALIGNX_LAYERS, make)
    fuse.freeze_trunk(model, FusionConfig())
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(trained(model).items(), found, strict=True)
    }


def kept(run: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """The loss, and the bytes that its graph keeps, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        loss = run()
    return loss, sum(t.untyped_storage().nbytes() for t in seen.values())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("gate", ["choice", "needs"])
def test_every_term_of_stage_2_has_the_same_gradients(gate: str, calibrated: bool) -> None:
    """And the routing and drifts that the losses read stay those of the forward pass, when the layers run again."""
    plain, model, p = mixture(gate, calibrated), mixture(gate, calibrated), part()
    recompute(model)
    for term in TERMS if calibrated else ("lm", "gating"):

        def loss(m: AlignXForCausalLM, term: str = term) -> Tensor:
            b = p.batch
            logits = m(b.input_ids, b.attention_mask, b.prompt_mask, use_cache=False).logits
            value: Tensor = getattr(align_terms(m, answer_nll(logits, b.labels), p.needs, p.lm_scale), term)
            return value

        expected, found = loss(plain), loss(model)
        left = (
            dict(model.routing.decisions),
            dict(model.routing.queries),
            [c.last_drift for c in output_calibrations(model)],
        )
        assert_close(
            {"loss": found.detach(), **gradients(model, found)},
            {"loss": expected.detach(), **gradients(plain, expected)},
        )
        after = (model.routing.decisions, model.routing.queries, [c.last_drift for c in output_calibrations(model)])
        for now, then in zip(
            (*after[0].values(), *after[1].values(), *after[2]),
            (*left[0].values(), *left[1].values(), *left[2]),
            strict=True,
        ):
            assert now is then
        assert any(bool(g.any()) for g in gradients(model, loss(model)).values())


@pytest.mark.parametrize("settings", [H3FUSION, TRINITYX], ids=["h3fusion", "trinityx"])
def test_a_fusion_has_the_same_gradients_and_keeps_less(settings: FusionSettings) -> None:
    stage, results = FusionConfig(gating=1.0, entropy=0.3, uniform=0.1), []
    for again in (False, True):
        model = fusion(settings)
        if again:
            recompute(model)
        loss_of = fuse.step_loss(model, stage, ["a", "b", "c"])
        torch.manual_seed(1)
        loss, size = kept(lambda m=model, f=loss_of: f(m, part()).loss, model)
        left = [layer.logits for layer in fusion_layers(model)]
        results.append(({"loss": loss.detach(), **gradients(model, loss)}, size))
        assert all(now is then for now, then in zip((m.logits for m in fusion_layers(model)), left, strict=True))
    assert_close(results[1][0], results[0][0])
    assert results[1][1] < 0.5 * results[0][1]


def test_the_frozen_layers_below_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("choice")
    recompute(model)
    counts = [0] * LAYERS
    for number, layer in enumerate(model.backbone.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: counts.__setitem__(n, counts[n] + 1))
    p = part()
    b = p.batch
    logits = model(b.input_ids, b.attention_mask, b.prompt_mask, use_cache=False).logits
    align_terms(model, answer_nll(logits, b.labels), p.needs, 1.0).total(AlignConfig()).backward()
    assert counts == [1, 2, 2]


def test_another_forward_pass_before_the_backward_pass_is_noticed() -> None:
    model, b = mixture("choice"), part().batch
    recompute(model)
    first = model(b.input_ids, b.attention_mask, b.prompt_mask, use_cache=False).logits
    model(b.input_ids, b.attention_mask, b.prompt_mask, use_cache=False)
    with pytest.raises(AssertionError, match="before the model's next forward pass"):
        first.sum().backward()


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with process_group():
        yield


def on_an_engine(which: str, again: bool) -> dict[str, Tensor]:
    """Losses and full gradients of two micro batches on a DeepSpeed engine."""
    from deepspeed.utils import safe_get_full_grad

    stage = SpecialistConfig(batch=8, accumulation=2) if which == "stage 1" else AlignConfig(batch=8, accumulation=2)
    plan = engines.Plan.of(stage, "float32", 10)
    filled = engines.fill(engines.read_template(stage.deepspeed, "deepspeed"), plan, 1, HIDDEN)
    sharded = HfDeepSpeedConfig(filled)
    loss: Loss
    if which == "stage 1":
        model, loss = base_model(), language_loss
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name and ".0." not in name)
        groups = engines.decay_groups(list(model.named_parameters()), 0.0)
    else:
        base, config = (
            base_model(),
            RunConfig(align=AlignConfig(drift=0.5, entropy=0.1, prior=0.1, expert_lr_scale=0.5)),
        )
        model, loss = aligned(base, low_rank_experts(base), placement=Placement(1, 0)), align.step_loss(config)
        freeze_trunk(model)
        align.make_expert_groups(1)
        groups = align.parameter_groups(model, config)
    if again:
        recompute(model)
    engine = engines.start(model, groups, filled, plan)
    engine.train()
    found = {}
    for number in range(4):
        made = loss(engine, part(packed=which == "stage 1"))
        engine.backward(made.loss)
        if number % 2:
            found |= {f"{number} {n}": safe_get_full_grad(p).clone() for n, p in trained(engine.module).items()}
        engine.step()
        found[f"loss {number}"] = made.loss.detach()
    engine.destroy()
    del sharded
    return found


@pytest.mark.parametrize("which", ["stage 1", "stage 2"])
def test_on_an_engine_the_gradients_are_the_same(group: None, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Stage 1 under ZeRO-3 on packed rows, stage 2 under ZeRO-2 with expert parallelism; also for a loss in pieces."""
    expected = on_an_engine(which, again=False)
    monkeypatch.setattr(losses, "MOST_LOGITS", 5 * VOCABULARY)
    assert_close(on_an_engine(which, again=True), expected)
    assert any(bool(t.any()) for name, t in expected.items() if "loss" not in name)


def sizes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fusion_zero2", "stage1_zero3"])
def test_an_engine_holds_what_the_dry_run_counts(group: None, name: str, dtype: str) -> None:
    """Its own tensors after a step of stage 1: weights, fp32 weights, Adam's states, and the next step's gradients."""
    settings = ModelConfig(path="tiny", dtype=dtype, layers=ALIGNX_LAYERS)
    base = BaseModel(settings, Planned(Path("tiny"), tiny_config()))
    stage = SpecialistConfig(batch=4, deepspeed=f"ds_configs/{name}.json")
    config = RunConfig(model=settings, axes={"a": AxisConfig()}, train=stage)
    held = Zero.of(config, base, "train", stage, 1, on_gpu=False).holds(model_of(config, base, "train", 1))
    plan = engines.Plan.of(stage, dtype, 10)
    filled = engines.fill(engines.read_template(stage.deepspeed, "deepspeed"), plan, 1, HIDDEN)
    sharded = HfDeepSpeedConfig(filled)
    model = base_model().to(base.dtype)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in parameter_name and ".0." not in parameter_name)
    engine = engines.start(model, engines.decay_groups(list(model.named_parameters()), 0.0), filled, plan)
    engine.backward(language_loss(engine, part(packed=True)).loss)
    engine.step()
    engine.backward(language_loss(engine, part(packed=True)).loss)
    zero = engine.optimizer
    if held.stage == 3:
        weights, masters = [p.ds_tensor for p in model.parameters()], zero.fp32_partitioned_groups_flat
        found = [zero.grad_partitions_flat_buffer]
    else:
        weights, masters = list(model.parameters()), zero.single_partition_of_fp32_groups
        found = [g for group in zero.averaged_gradients.values() for g in group]
    states = [t for state in zero.optimizer.state.values() for t in state.values() if t.dim()]
    assert held.parameters == sizes(*weights)
    assert held.optimizer == sizes(*masters, *states)
    assert held.gradients == sizes(*found)
    engine.destroy()
    del sharded


@pytest.mark.parametrize("gate", ["choice", "needs"])
def test_less_is_kept_and_the_estimate_tells_how_much(gate: str) -> None:
    b, sizes = part().batch, []
    tokens = torch.ones_like(b.attention_mask)  # the estimate counts every token of a micro batch, also of padding
    for again in (False, True):
        model = mixture(gate)
        if again:
            recompute(model)
        sizes.append(kept(lambda m=model: m(b.input_ids, tokens, b.prompt_mask, use_cache=False).logits, model)[1])
    config = RunConfig(align=AlignConfig(ep_size=0, expert_lr_scale=0.1))
    config.axes = {name: AxisConfig() for name in "abc"}
    config.experts.rank = max(model.config.ranks.values())
    config.gate.anchors, config.gate.scales = model.config.gate["anchors"], model.config.gate["scales"]
    count, first = b.input_ids.numel(), min(ALIGNX_LAYERS)
    estimate = Activations.estimate(model.config.text_config, 4, first, count, Ffn.of(config, "align"))
    assert sizes[1] < 0.3 * sizes[0]
    assert estimate.kept == pytest.approx(sizes[0], rel=0.25)


@pytest.mark.parametrize("family", MIXTURES)
def test_over_a_mixture_of_experts_the_gradients_are_the_same_and_the_estimate_holds(family: str) -> None:
    """Its router picks the same experts when the layers run again."""
    base, b, results = base_model(family=family), part().batch, []
    tokens = torch.ones_like(b.attention_mask)
    for again in (False, True):
        model = aligned(base, attention_experts(base)).train()
        freeze_trunk(model)
        if again:
            recompute(model)
        run = lambda m=model: m(b.input_ids, tokens, b.prompt_mask, use_cache=False).logits.square().mean()  # noqa: E731
        loss, size = kept(run, model)
        results.append(({"loss": loss.detach(), **gradients(model, loss)}, size))
    assert_close(results[1][0], results[0][0])
    assert results[1][1] < 0.5 * results[0][1]
    config = RunConfig(align=AlignConfig(ep_size=0, expert_lr_scale=0.1), axes={n: AxisConfig() for n in "abc"})
    config.gate.anchors, config.gate.scales = model.config.gate["anchors"], model.config.gate["scales"]
    ffn = Ffn.of(config, "align", base.config.num_experts_per_tok)
    estimate = Activations.estimate(base.config, 4, min(ALIGNX_LAYERS), b.input_ids.numel(), ffn)
    assert estimate.kept == pytest.approx(results[0][1], rel=0.25)


def test_eager_attention_keeps_its_probabilities_too() -> None:
    ids, found = torch.randint(1, VOCABULARY, (2, 40)), {}
    for implementation in ("sdpa", "eager"):
        model = base_model()
        attention.choose(model, implementation)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name)
        found[implementation] = kept(lambda m=model: m(input_ids=ids, use_cache=False).logits, model)[1]
    estimates = [Activations.estimate(model.config, 4, 0, ids.numel(), eager=eager).kept for eager in (0, ids.shape[1])]
    assert estimates[1] - estimates[0] == pytest.approx(found["eager"] - found["sdpa"], rel=0.15)


def test_the_estimate_at_llama2_7b_is_what_was_measured() -> None:
    llama = shape("llama2-7b")
    assert llama is not None
    assert Activations.estimate(llama, 2, 31, 1).layer == pytest.approx(162e3, rel=0.01)
    shallow = copy.deepcopy(llama)
    shallow.num_hidden_layers = 3
    three = Activations.estimate(shallow, 2, 0, 1)
    assert three.kept / 3 == pytest.approx(145.7e3, rel=0.01), "benchmarks/memory.py --activations"
    recipe = Activations.estimate(llama, 2, 16, 8 * 2048)
    assert recipe.kept == pytest.approx(38.5 * 2**30, rel=0.01)
    assert recipe.recomputed < 5 * 2**30
    assert recipe.recompute("auto") and not recipe.recompute("false")
    most = Activations(MOST, 0, 0, 0)
    assert most.recompute("true") and not most.recompute("auto")
