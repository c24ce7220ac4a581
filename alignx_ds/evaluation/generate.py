"""Greedy answers from any causal LM, base, specialist or aligned: KV cache, left padding, prompts spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds import distributed
from alignx_ds.console import Progress
from alignx_ds.data.encode import encode_prompts, pad_token


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    batch: int,
    max_new_tokens: int,
    progress: Progress | None = None,
) -> list[str]:
    """One answer per prompt, in order, on every rank; no system prompt, so no hint of the axis. Collective."""
    own = distributed.mine(prompts)
    made: list[str] = []
    for start in range(0, len(own), batch):
        made += _decode(model, tokenizer, own[start : start + batch], max_new_tokens)
    if progress is not None:
        progress.advance()
    return distributed.interleave(distributed.gather(made))


@torch.no_grad()
def _decode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int) -> list[str]:
    model.eval()
    device, pad_id = distributed.device(), pad_token(tokenizer)
    ids, mask = left_pad(encode_prompts(prompts, tokenizer), pad_id)
    settings: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": pad_id}
    made = model.generate(ids.to(device), attention_mask=mask.to(device), **settings)
    texts: list[str] = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def left_pad(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both [B, T]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
