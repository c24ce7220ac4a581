"""Greedy decoding of any causal LM: static KV cache, left-padded prompts of any lengths, no question to the device.

A step's shapes never change, so it can be compiled and, on CUDA, captured as a graph. Shapes: B rows, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

LOOK_EVERY = 16  # steps between two looks at whether every row has ended: a look makes the host wait for the device

Step = Callable[[Tensor, Tensor, Tensor, StaticCache], Tensor]


class Decoder:
    """`compiled` steps pay off over many batches of one shape: each new shape is compiled anew."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        self.model, self.compiled = model.eval(), compiled
        self.step: Step = self._step
        if compiled:
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def greedy(self, ids: Tensor, mask: Tensor, limit: int, ends: list[int], pad_id: int) -> Tensor:
        """ids, mask [B, T], padded on the left -> [B, at most `limit`]: answers, `pad_id` after one of the `ends`."""
        cache, token = self.prefill(ids, mask, limit)
        # The columns of tokens to come are open: causality closes those that have not come yet.
        whole = torch.cat([mask, mask.new_ones(len(ids), limit)], dim=1)
        position = mask.sum(-1, keepdim=True)
        last = torch.tensor(ends, device=ids.device)
        done = torch.zeros_like(token, dtype=torch.bool)
        answers = torch.full((len(ids), limit), pad_id, device=ids.device)
        for number in range(limit):
            answers[:, number : number + 1] = token.masked_fill(done, pad_id)
            done = done | torch.isin(token, last)
            if number + 1 == limit or (number % LOOK_EVERY == LOOK_EVERY - 1 and bool(done.all())):
                break
            token = self.step(token, whole, position + number, cache).clone()  # a graph's output is overwritten
        return answers

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> tuple[StaticCache, Tensor]:
        """(the cache, with room for so many more tokens; the first answer token [B, 1])."""
        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=ids.shape[1] + room)
        token = self._step(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), cache)
        return cache, token

    def _step(self, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
        output: Any = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits[:, -1].argmax(-1, keepdim=True)
