"""Greedy decoding of any causal LM, with a static KV cache and left-padded prompts.

The shapes of a decoding step never change, so it can be compiled and, on CUDA, captured as a graph. Nothing within a
step waits for the device. Shapes: B rows, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

CHECK_EVERY = 16  # steps between two checks whether every row has ended; a check makes the host wait for the device

Step = Callable[[Tensor, Tensor, Tensor, StaticCache], Tensor]


class Decoder:
    """Decodes with one model. A `compiled` step is compiled anew for every shape, so it needs many batches of one."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        self.model, self.compiled = model.eval(), compiled
        self.step: Step = self._step
        if compiled:
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            self.step = torch.compile(self._step, mode=mode, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def greedy(self, ids: Tensor, mask: Tensor, limit: int, ends: list[int], pad_id: int) -> Tensor:
        """The most likely token at every step, until each row has one of the `ends` or `limit` tokens are made.

        `ids` and `mask` are [B, T] int64, padded on the left. Returns [B, at most `limit`] int64; what follows a row's
        first end token is `pad_id`.
        """
        cache, token = self.prefill(ids, mask, limit)
        # The mask also covers the tokens to come: causal attention hides those that are not decoded yet.
        full_mask = torch.cat([mask, mask.new_ones(len(ids), limit)], dim=1)
        position = mask.sum(-1, keepdim=True)
        end_tokens = torch.tensor(ends, device=ids.device)
        done = torch.zeros_like(token, dtype=torch.bool)
        answers = torch.full((len(ids), limit), pad_id, device=ids.device)
        for number in range(limit):
            answers[:, number : number + 1] = token.masked_fill(done, pad_id)
            done = done | torch.isin(token, end_tokens)
            if number + 1 == limit or (number % CHECK_EVERY == CHECK_EVERY - 1 and bool(done.all())):
                break
            token = self.step(token, full_mask, position + number, cache).clone()  # a graph's output is overwritten
        return answers

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor, new_tokens: int) -> tuple[StaticCache, Tensor]:
        """Read the prompts [B, T]. Returns the cache, with room for `new_tokens` more, and the first tokens [B, 1]."""
        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=ids.shape[1] + new_tokens)
        token = self._step(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), cache)
        return cache, token

    def _step(self, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
        """ids and position [B, n], mask [B, cached tokens + n] -> the next token [B, 1]."""
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
