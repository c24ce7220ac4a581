"""Decoding of any causal LM, greedy or sampled, with a static KV cache and left-padded prompts.

The shapes of a decoding step never change, so it can be compiled and, on CUDA, captured as a graph. Nothing within a
step waits for the device. Shapes: B rows, T prompt tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from alignx_ds.mocae import kv_cache
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.sharding import is_sharded
from alignx_ds.runtime import attention, distributed

CHECK_EVERY = 16  # steps between two checks whether every row has ended; a check makes the host wait for the device

Step = Callable[[Tensor, Tensor, Tensor, StaticCache], Tensor]
Choose = Callable[[Tensor], Tensor]  # logits [B, V] -> the next tokens [B, 1]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # new ids, mask, positions -> the next token's logits [B, V]


class CapturedStep:
    """A decode step that the host launches as one CUDA graph instead of about a thousand kernels.

    The first step of a prompt runs without capture, which loads every kernel. The second step is captured: until the
    next prompt, the memory that it reads beside its arguments (weights, KV cache, routing) does not move. A step that
    can't be captured runs without a graph.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.disabled = step, False
        self._cache: weakref.ref[StaticCache] | None = None  # the current prompt's
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._token: Tensor | None = None

    def __call__(self, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
        if self.disabled or self._cache is None or self._cache() is not cache:
            self._cache, self._graph = weakref.ref(cache), None
            return self.step(ids, mask, position, cache)
        if self._graph is None and not self._capture(ids, mask, position, cache):
            return self.step(ids, mask, position, cache)
        assert self._graph is not None and self._inputs is not None and self._token is not None
        for captured, argument in zip(self._inputs, (ids, mask, position), strict=True):
            captured.copy_(argument)
        self._graph.replay()
        return self._token

    def _capture(self, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> bool:
        """Record the step without running it. Returns whether that succeeded."""
        if not _has_fixed_layers(cache, mask.shape[1]):
            self.disabled = True
            return False
        graph, inputs = torch.cuda.CUDAGraph(), (ids.clone(), mask.clone(), position.clone())
        try:
            with torch.cuda.graph(graph):
                token = self.step(*inputs, cache)
        except RuntimeError:  # CUDA's: the step does something that a capture does not permit
            self.disabled = True
            return False
        self._graph, self._inputs, self._token = graph, inputs, token
        return True


def _has_fixed_layers(cache: StaticCache, width: int) -> bool:
    """Whether every attention window covers prompt and answer. Narrower ones move, and Python counts their position."""
    kinds = (StaticLayer, StaticSlidingWindowLayer)
    return all(type(layer) in kinds and layer.max_cache_len >= width for layer in cache.layers)


def needs_host_sync(model: PreTrainedModel) -> bool:
    """Whether the host must read values from the device within a step, such as how many tokens an expert has."""
    return any(getattr(module, "needs_host_sync", False) for module in model.modules())


class Decoder:
    """Decodes with one model. On CUDA its steps are captured as a graph, unless `captured` is false.

    A `compiled` step is compiled anew for every shape, so it needs many batches of one.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False, captured: bool = True) -> None:
        attention.avoid_planning()
        self.model, self.compiled = model.eval(), compiled and not is_sharded(model)

        # No method: the decoder would refer to itself, and so keep its model until Python looks for such circles.
        def step(ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
            return _step(model, ids, mask, position, cache)

        self.step: Step = step
        if self.compiled:
            self.step = torch.compile(step, fullgraph=True, dynamic=False)
        self.lockstep = is_sharded(model)
        moves = getattr(model, "hf_device_map", None) is not None  # accelerate may move weights between steps
        in_place = not moves and not self.lockstep
        if captured and in_place and model.device.type == "cuda" and not needs_host_sync(model):
            self.step = CapturedStep(self.step)

    @torch.no_grad()
    def greedy(self, ids: Tensor, mask: Tensor, limit: int, ends: list[int], pad_id: int) -> Tensor:
        """The most likely token at every step, until each row has one of the `ends` or `limit` tokens are made.

        `ids` and `mask` are [B, T] int64, padded on the left. Returns [B, at most `limit`] int64; what follows a row's
        first end token is `pad_id`. Collective where the model is sharded.
        """
        cache, token = self.prefill(ids, mask, limit)

        def after(token: Tensor, full_mask: Tensor, position: Tensor) -> Tensor:
            return self.step(token, full_mask, position, cache).clone()  # a graph's output is overwritten

        return self._answers(token, after, mask, limit, ends, pad_id)

    @torch.no_grad()
    def sampled(self, ids: Tensor, mask: Tensor, limit: int, ends: list[int], pad_id: int, choose: Choose) -> Tensor:
        """As `greedy`, but for the tokens, which are those that `choose` takes. No step is compiled or captured."""
        predict = self.predictor(ids, limit)

        def after(token: Tensor, full_mask: Tensor, position: Tensor) -> Tensor:
            return choose(predict(token, full_mask, position))

        return self._answers(after(ids, mask, prompt_positions(mask)), after, mask, limit, ends, pad_id)

    def _answers(
        self,
        token: Tensor,
        after: Callable[[Tensor, Tensor, Tensor], Tensor],
        mask: Tensor,
        limit: int,
        ends: list[int],
        pad_id: int,
    ) -> Tensor:
        """The first tokens [B, 1] and those that come `after` each, as `greedy` returns them."""
        # The mask also covers the tokens to come: causal attention hides those that are not decoded yet.
        full_mask = torch.cat([mask, mask.new_ones(len(mask), limit)], dim=1)
        position = mask.sum(-1, keepdim=True)
        end_tokens = torch.tensor(ends, device=mask.device)
        done = torch.zeros_like(token, dtype=torch.bool)
        answers = torch.full((len(mask), limit), pad_id, device=mask.device)
        for number in range(limit):
            answers[:, number : number + 1] = token.masked_fill(done, pad_id)
            done = done | torch.isin(token, end_tokens)
            if number + 1 == limit or (number % CHECK_EVERY == CHECK_EVERY - 1 and self._are_all(done)):
                break
            token = after(token, full_mask, position + number)
        return answers

    def _are_all(self, done: Tensor) -> bool:
        """Whether all rows have ended, on all ranks where each needs the others' weights."""
        ended = bool(done.all())
        return distributed.on_all(ended) if self.lockstep else ended

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor, new_tokens: int) -> tuple[StaticCache, Tensor]:
        """Read the prompts [B, T]. Returns the cache, with room for `new_tokens` more, and the first tokens [B, 1]."""
        cache = self._cache(ids, new_tokens)
        return cache, _step(self.model, ids, mask, prompt_positions(mask), cache)

    def predictor(self, ids: Tensor, new_tokens: int) -> Predict:
        """What the model predicts, of the prompts [B, T] first and of each token after them; it keeps the cache."""
        cache = self._cache(ids, new_tokens)
        return lambda ids, mask, position: next_logits(self.model, ids, mask, position, cache)

    def _cache(self, ids: Tensor, new_tokens: int) -> StaticCache:
        if isinstance(self.model, AlignXForCausalLM):
            self.model.forward_pass.fixed = self.compiled
        return StaticCache(config=self.model.config.get_text_config(), max_cache_len=ids.shape[1] + new_tokens)


def prompt_positions(mask: Tensor) -> Tensor:
    """Of the tokens [B, T] of prompts that are padded on the left."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _step(model: PreTrainedModel, ids: Tensor, mask: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
    """ids and position [B, n], mask [B, cached tokens + n] -> the next token [B, 1]."""
    return next_logits(model, ids, mask, position, cache).argmax(-1, keepdim=True)


def next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, position: Tensor, cache: Cache) -> Tensor:
    """ids and position [B, n], mask [B, cached tokens + n] -> the next token's logits [B, V]."""
    output: Any = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        use_cache=True,
        logits_to_keep=1,
        **{kv_cache.ARGUMENT: cache},
    )
    logits: Tensor = output.logits
    return logits[:, -1]
