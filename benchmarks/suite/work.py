"""The timed work: a prefill, or a few decode steps, of every model of a system."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache

from alignx_ds.evaluation.decode import Decoder, needs_host_sync
from alignx_ds.mocae.layer import alignx_layers
from suite.systems import System
from suite.timing import Work

Pool = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values, by layer
STEPS = 8  # decode steps in one round
WAYS = (
    "eager",
    "captured",
    "compiled",
)  # to run a decode step; on CUDA compiled steps are captured as well, on the CPU none is


def prefill_work(system: System, batch: int, length: int) -> Work:
    decoders = [Decoder(model) for model in system.models]
    ids, mask = _prompts(system, batch, length)

    def work() -> None:
        for decoder in decoders:
            decoder.prefill(ids, mask, 1)

    return Work(work, system.prepare)


def decode_work(system: System, batch: int, length: int, rounds: int, way: str, pool: Pool | None = None) -> Work:
    """Decodes `STEPS` tokens per call, in one of `WAYS`; the cache has room for all rounds.

    Systems with the same `pool` share one KV cache. Its values are then those of another system; times are unaffected.
    """
    system.prepare()
    compiled = way == "compiled" and not any(map(needs_host_sync, system.models))
    decoders = [Decoder(model, compiled=compiled, captured=way != "eager") for model in system.models]
    ids, mask = _prompts(system, batch, length)
    room = STEPS * (rounds + 1)
    started = [_pooled(decoder.prefill(ids, mask, room), pool) for decoder in decoders]
    whole = torch.cat([mask, mask.new_ones(batch, room)], dim=1)
    position = torch.full((batch, 1), length, device=ids.device)

    @torch.no_grad()
    def work() -> None:
        for decoder, (cache, token) in zip(decoders, started, strict=True):
            for _ in range(STEPS):
                token = decoder.step(token, whole, position, cache).clone()

    return Work(work, system.prepare)


def _prompts(system: System, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = system.models[0]
    vocabulary = model.config.get_text_config().vocab_size
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (batch, length), generator=source).to(model.device)
    return ids, torch.ones_like(ids)


def _pooled(started: tuple[StaticCache, torch.Tensor], pool: Pool | None) -> tuple[StaticCache, torch.Tensor]:
    cache, _ = started
    if pool is not None:
        pool += [] if pool else [(layer.keys, layer.values) for layer in cache.layers]
        for layer, (keys, values) in zip(cache.layers, pool, strict=True):
            layer.keys, layer.values = keys, values
    return started


def bytes_of_step(system: System, batch: int, length: int) -> dict[str, float]:
    """Bytes of weights and of KV cache that a decode step reads. Of the embedding it reads single rows, not counted."""
    found = {"weights": 0.0, "kv_cache": 0.0}
    for model in system.models:
        backbone: Any = getattr(model, "backbone", model)
        table = backbone.get_input_embeddings().weight
        mixtures = [layer.mixture for layer in alignx_layers(model)]
        factors = {id(p): p for mixture in mixtures for p in mixture.parameters()}
        rest = {id(p): p for p in backbone.parameters()}.values()
        found["weights"] += sum(_size(p) for p in rest if id(p) not in factors and p is not table)
        for mixture in mixtures:
            own = sum(_size(p) for p in mixture.parameters())
            found["weights"] += own * min(batch * system.experts / (mixture.num_experts - 1), 1.0)
        c = model.config.get_text_config()
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        element = table.element_size()
        found["kv_cache"] += 2.0 * c.num_hidden_layers * batch * length * c.num_key_value_heads * width * element
    return found


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
