"""Batches that are made ahead, the peaks of devices, and the FLOPs of a token."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from tiny_models import LAYERS, MIXTURES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from alignx_ds.data.batches import collate
from alignx_ds.data.encode import Example
from alignx_ds.mocae.backbones import BACKBONES
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.training import flops
from alignx_ds.training.losses import forward_nll
from alignx_ds.training.speed import ahead, peak_flops


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in ahead(items()):
        assert made[min(number + 1, 2)].wait(5), "the next one is made, though nobody has asked for it"
    assert list(ahead(iter("abc"))) == ["a", "b", "c"] and list(ahead(iter(()))) == []


def test_an_error_in_making_an_item_is_raised_where_it_is_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"):
        seen += ahead(items())


def test_a_peak_is_the_given_one_or_none_where_it_is_not_known() -> None:
    assert peak_flops(torch.float32, 2.5) == 2.5e12
    assert peak_flops(torch.float32) is None


def counted(model: nn.Module, layers: list[int], trained: set[str]) -> float:
    """FLOPs of the linear layers' products in a forward and backward pass of one token, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trained or name in trained)
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[1]]), use_cache=False).logits.sum().backward()
    products = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op)}
    return float(sum(n for op, n in products.items() if "bmm" not in str(op)))


@pytest.mark.parametrize("layers", [[1, 2], [2], [0, 2]])
def test_the_flops_of_a_fine_tune_are_those_that_torch_counts(layers: list[int]) -> None:
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(config)
    names = {BACKBONES["llama"].weight_name(layer, p) for layer in layers for p in PROJECTIONS}
    assert flops.fine_tune(config, layers) == counted(model, layers, names)


def test_the_flops_of_a_whole_model_are_those_that_torch_counts() -> None:
    config = tiny_config()
    assert flops.whole_model(config) == counted(AutoModelForCausalLM.from_config(config), [], set())


def test_the_head_counts_for_the_tokens_that_predict_an_answer_s() -> None:
    """As torch counts those of the loss that training has: 7 tokens, of which 3 predict one."""
    from torch.utils.flop_counter import FlopCounterMode

    config, batch = tiny_config(), collate([Example(tuple(range(1, 8)), 4)], 0)
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        forward_nll(model, batch, input_ids=batch.input_ids, use_cache=False).backward()
    products = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    seen = sum(n for op, n in products.items() if "mm" in op and "bmm" not in op)
    assert 7 * flops.whole_model(config, learned=3 / 7) == pytest.approx(seen, rel=1e-12)


@pytest.mark.parametrize("family", MIXTURES)
def test_of_a_mixture_the_experts_count_that_a_token_goes_through(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(family, **({"mlp_only_layers": []} if family == "qwen3_moe" else {}))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # grouped GEMMs are not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[1]]), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    w, routers = flops.Weights.of(config), LAYERS * config.hidden_size * config.num_experts
    assert products == 2 * (w.layers * (w.attention + w.ffn) + w.head + routers)


def test_frozen_factors_need_no_gradients() -> None:
    config = tiny_config()
    frozen, trained = (flops.mixture(config, [1, 2], 4, 8, fused=True, factors_trained=t) for t in (False, True))
    factors = 3 * 8 * (config.hidden_size + config.intermediate_size)
    assert trained - frozen == 2 * 2 * 3 * factors, "of three specialists in two layers"
    assert flops.fusion(config, [1, 2], 1) == flops.fine_tune(config, [1, 2])
