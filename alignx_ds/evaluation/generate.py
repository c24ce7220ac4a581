"""Greedy answers from any causal LM, base, specialist or aligned: KV cache, left padding, prompts spread over ranks."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.encode import encode_prompts, pad_token
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.evaluation.transcripts import Answers
from alignx_ds.runtime import distributed, signals

STEP_WIDTH = 64  # compiled steps are made anew for every width of a batch, so widths are rounded up to this


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    batch: int,
    max_new_tokens: int,
    compiled: bool = False,
    keep: Answers | None = None,
) -> list[str]:
    """One answer per prompt, in order, on every rank; no system prompt, so no hint of the axis. Collective.

    With `keep`, what its file holds is not made again, and every batch is in the file as soon as it is made.
    """
    made: list[str] = distributed.on_main(lambda: keep.kept() if keep is not None else [])
    step, decoder = batch * distributed.world_size(), Decoder(model, compiled=compiled)
    for start in range(len(made), len(prompts), step):
        signals.stop_if_requested(f"answers, after {start} of {len(prompts)}")
        own = distributed.rank_share(prompts[start : start + step])
        part = distributed.interleave(
            distributed.gather(_decode(decoder, tokenizer, own, max_new_tokens) if own else [])
        )
        if keep is not None and distributed.is_main():
            keep.append(start, part)
        made = [*made, *part]
    return made


def _decode(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int) -> list[str]:
    device, pad_id = distributed.device(), pad_token(tokenizer)
    ids, mask = left_pad(encode_prompts(prompts, tokenizer), pad_id, STEP_WIDTH if decoder.compiled else 1)
    made = decoder.greedy(ids.to(device), mask.to(device), limit, _ends(decoder.model), pad_id)
    texts: list[str] = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _ends(model: PreTrainedModel) -> list[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def left_pad(rows: list[list[int]], pad_id: int, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both [B, T], T a multiple of this."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
