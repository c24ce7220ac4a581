"""The rows that are decoded together, each in a slot of one KV cache, with its own length and its own routing.

Rows join and leave between two steps. A row's tokens do not depend on the others: it attends to its own slot alone,
and its routing is its own, decided at its prefill. Shapes: B rows, H heads, C columns of a slot, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from alignx_ds.mocae import kv_cache
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.routing_state import Routing
from alignx_ds.mocae.serving import gates_of_needs

WIDTH_MULTIPLE = 64  # columns that attention reads are a multiple of this, so that few shapes occur


@dataclass
class Places:
    """Where the next step writes and what it reads: the first `rows` slots up to column `width`."""

    rows: Tensor  # [B] int64, 0 … B − 1
    columns: Tensor  # [B] int64, where each row's next token goes
    width: int


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One decoder layer's keys and values [slots, H, C, head size], which are allocated once."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.places: Places | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a slot is allocated before it is used")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row, key_states [B, H, 1, head size], and return what the rows may attend to."""
        assert self.places is not None and key_states.shape[2] == 1
        rows, columns = self.places.rows, self.places.columns
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        n, width = len(rows), self.places.width
        return self.keys[:n, :, :width], self.values[:n, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.places is not None
        return self.places.width, 0

    def get_seq_length(self) -> int:
        return 0 if self.places is None else self.places.width

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been read: its KV cache, its routing (None in a dense model), and the next token's logits."""

    cache: DynamicCache
    routing: Routing | None
    logits: Tensor  # [1, V]
    length: int


class Slots:
    """A model and its running rows. Row i has slot i; where one leaves, the last one takes its place."""

    def __init__(self, model: PreTrainedModel, count: int, context: int) -> None:
        """`count` rows at most, each of `context` tokens at most. All their memory is allocated here."""
        self.model, self.count, self.context = model.eval(), count, context
        config = model.config.get_text_config()
        self._window: int | None = getattr(config, "sliding_window", None)
        self._kinds: set[str] = set(getattr(config, "layer_types", None) or ())
        columns = -(-context // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self._layers = [
            SlotLayer(*(t.new_zeros(count, t.shape[1], columns, t.shape[3]) for t in (layer.keys, layer.values)))
            for layer in self.prefill([0]).cache.layers
        ]
        self._cache = Cache(layers=self._layers)
        self._lengths: list[int] = []  # by row
        self._routings: list[Routing | None] = []
        self._changed = True  # whether rows have joined or left since the last step

    def __len__(self) -> int:
        return len(self._lengths)

    @torch.no_grad()
    def prefill(self, ids: list[int], needs: list[float] | None = None) -> Prefilled:
        """Read a prompt alone; an aligned model's gates decide, or the axes' `needs` are as given. No row is added."""
        cache, forced = DynamicCache(), {}
        if needs is not None:
            forced["forced"] = gates_of_needs(torch.tensor([needs], dtype=torch.float32, device=self.model.device))
        given = torch.tensor([ids], device=self.model.device)
        output: Any = self.model(
            input_ids=given, use_cache=True, logits_to_keep=1, **{kv_cache.ARGUMENT: cache}, **forced
        )
        return Prefilled(cache, getattr(cache, "routing", None), output.logits[:, -1], len(ids))

    def add(self, read: Prefilled) -> None:
        """A row for this prompt; several may be added for one."""
        row = len(self)
        assert row < self.count and read.length < self.context
        for own, layer in zip(self._layers, read.cache.layers, strict=True):
            own.keys[row, :, : read.length] = layer.keys[0]
            own.values[row, :, : read.length] = layer.values[0]
        self._lengths.append(read.length)
        self._routings.append(read.routing)
        self._changed = True

    def remove(self, row: int) -> None:
        """Free a row's slot. The last row moves there and takes its number."""
        last, length = len(self) - 1, self._lengths[-1]
        if row != last:
            for layer in self._layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self._lengths[row], self._routings[row] = length, self._routings[last]
        self._lengths.pop()
        self._routings.pop()
        self._changed = True

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """One token for each row, [B] -> the logits of the next ones [B, V]."""
        assert len(tokens) == len(self) and max(self._lengths) < self.context
        device, n = self.model.device, len(tokens)
        columns = torch.tensor(self._lengths, device=device)
        width = -(-(max(self._lengths) + 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        places = Places(torch.arange(n, device=device), columns, width)
        for layer in self._layers:
            layer.places = places
        if isinstance(self.model, AlignXForCausalLM) and self._changed:
            self._cache.routing = Routing.joined([routing for routing in self._routings if routing is not None])
        self._changed = False
        output: Any = self.model(
            input_ids=torch.tensor(tokens, device=device).unsqueeze(1),
            attention_mask=self._masks(columns, width),
            position_ids=columns.unsqueeze(1),
            use_cache=True,
            **{kv_cache.ARGUMENT: self._cache},
        )
        self._lengths = [length + 1 for length in self._lengths]
        logits: Tensor = output.logits
        return logits[:, -1]

    def _masks(self, columns: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What is added to the attention's scores, [B, 1, 1, width]: a row sees its own columns, or a window of them.

        transformers takes such a mask as it is. Where layers differ, it takes one by kind of layer.
        """
        places = torch.arange(width, device=columns.device)
        seen = (places <= columns.unsqueeze(1))[:, None, None]
        full = self._added(seen)
        if self._window is None:
            return full
        near = self._added(seen & (places > (columns - self._window).unsqueeze(1))[:, None, None])
        if not self._kinds:
            return near
        return {"full_attention": full, "sliding_attention": near}

    def _added(self, seen: Tensor) -> Tensor:
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
