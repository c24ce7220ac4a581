"""Greedy decoding of any causal LM: static KV cache, left-padded prompts of any lengths, no question to the device.

A step's shapes never change, so it can be compiled and, on CUDA, captured as a graph. Shapes: B rows, T prompt tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

LOOK_EVERY = 16  # steps between two looks at whether every row has ended: a look makes the host wait for the device

Step = Callable[[Tensor, Tensor, Tensor, StaticCache], Tensor]


class CapturedStep:
    """A decode step that the host launches as one CUDA graph instead of some thousand kernels.

    A prompt's first step runs as it is, which loads every kernel. The second is captured: what it reads beside its
    arguments (weights, KV cache, routing) stays where it is until the next prompt. A step that can't be captured goes
    on as it is.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.refused = step, False
        self._cache: weakref.ref[StaticCache] | None = None  # of the prompt whose steps these are
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._token: Tensor | None = None

    def __call__(self, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
        if self.refused or self._cache is None or self._cache() is not cache:
            self._cache, self._graph = weakref.ref(cache), None
            return self.step(ids, mask, position, cache)
        if self._graph is None and not self._capture(ids, mask, position, cache):
            return self.step(ids, mask, position, cache)
        assert self._graph is not None and self._inputs is not None and self._token is not None
        for kept, given in zip(self._inputs, (ids, mask, position), strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._token

    def _capture(self, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> bool:
        """Record the step without running it; whether that worked."""
        if not _stands_still(cache, mask.shape[1]):
            self.refused = True
            return False
        graph, inputs = torch.cuda.CUDAGraph(), (ids.clone(), mask.clone(), position.clone())
        try:
            with torch.cuda.graph(graph):
                token = self.step(*inputs, cache)
        except RuntimeError:  # of CUDA: what was asked is not permitted while capturing
            self.refused = True
            return False
        self._graph, self._inputs, self._token = graph, inputs, token
        return True


def _stands_still(cache: StaticCache, width: int) -> bool:
    """No window of attention is narrower than prompt and answer: such a cache moves on, and Python counts how far."""
    kinds = (StaticLayer, StaticSlidingWindowLayer)
    return all(type(layer) in kinds and layer.max_cache_len >= width for layer in cache.layers)


def asks_device(model: PreTrainedModel) -> bool:
    """Whether a step's kernels depend on numbers that only the device knows, such as how many tokens an expert has."""
    return any(getattr(module, "asks_device", False) for module in model.modules())


class Decoder:
    """On CUDA the steps are captured as a graph, unless `captured` says otherwise.

    `compiled` steps pay off over many batches of one shape: each new shape is compiled anew.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False, captured: bool = True) -> None:
        self.model, self.compiled = model.eval(), compiled
        self.step: Step = self._step
        if compiled:
            self.step = torch.compile(self._step, fullgraph=True, dynamic=False)
        placed = getattr(model, "hf_device_map", None) is None  # else weights may come and go
        if captured and placed and model.device.type == "cuda" and not asks_device(model):
            self.step = CapturedStep(self.step)

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
