"""The timed work: a prefill, or a few decode steps, of every model of a system."""

from __future__ import annotations

from collections.abc import Callable

import torch

from alignx_ds.evaluation.decode import Decoder
from suite.systems import System

STEPS = 8  # decode steps in one round


def prefill_work(system: System, batch: int, length: int) -> Callable[[], object]:
    decoders = [Decoder(model) for model in system.models]
    ids, mask = _prompts(system, batch, length)

    def work() -> None:
        system.prepare()
        for decoder in decoders:
            decoder.prefill(ids, mask, 1)

    return work


def decode_work(system: System, batch: int, length: int, rounds: int, compiled: bool) -> Callable[[], object]:
    """Decodes `STEPS` tokens per call; the cache has room for all rounds."""
    system.prepare()
    decoders = [Decoder(model, compiled=compiled) for model in system.models]
    ids, mask = _prompts(system, batch, length)
    room = STEPS * (rounds + 1)
    started = [decoder.prefill(ids, mask, room) for decoder in decoders]
    whole = torch.cat([mask, mask.new_ones(batch, room)], dim=1)
    position = torch.full((batch, 1), length, device=ids.device)

    @torch.no_grad()
    def work() -> None:
        system.prepare()
        for decoder, (cache, token) in zip(decoders, started, strict=True):
            for _ in range(STEPS):
                token = decoder.step(token, whole, position, cache).clone()

    return work


def _prompts(system: System, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = system.models[0]
    vocabulary = model.config.get_text_config().vocab_size
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (batch, length), generator=source).to(model.device)
    return ids, torch.ones_like(ids)
