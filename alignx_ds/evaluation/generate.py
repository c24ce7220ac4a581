"""Answers from any causal LM, base, specialist or aligned, greedy or sampled. The prompts are spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.batches import pad
from alignx_ds.data.chats import Prompt
from alignx_ds.data.encode import encode_prompts, pad_token
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.evaluation.sampling import Sampling, choose
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.models.ends import ends_of
from alignx_ds.runtime import distributed, signals

WIDTH_MULTIPLE = 64  # prompts of compiled steps are padded to a multiple of this: every new width is compiled anew
Draws = Callable[[int], tuple[Sampling, Random]]  # by the number of a prompt: how its tokens are chosen


def answers(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch: int,
    max_new_tokens: int,
    compiled: bool = False,
    file: AnswerFile | None = None,
    draws: Draws | None = None,
) -> list[str]:
    """One answer per prompt, in order, the same list on every rank: greedy, or as `draws` has it. Collective.

    The prompts get no system prompt, so they carry no hint of their axis. With `file`, answers that it holds are not
    generated again, and every new batch is appended to it at once. A sampled answer does not depend on its batch. A
    decoder is used as it is.
    """
    done: list[str] = distributed.on_main(lambda: file.load() if file is not None else [])
    step = batch * distributed.world_size()
    decoder = model if isinstance(model, Decoder) else Decoder(model, compiled=compiled and draws is None)
    for start in range(len(done), len(prompts), step):
        signals.stop_if_requested(f"answers, after {start} of {len(prompts)}")
        own = distributed.rank_share(list(range(start, min(start + step, len(prompts)))))
        taking_part = own or ([0] if decoder.lockstep else [])
        asked, drawn = [prompts[n] for n in taking_part], [draws(n) for n in taking_part] if draws else []
        made = _decode(decoder, tokenizer, asked, max_new_tokens, drawn) if taking_part else []
        part = distributed.interleave(distributed.gather(made[: len(own)]))
        if file is not None and distributed.is_main():
            file.append(start, part)
        done = [*done, *part]
    return done


def _decode(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    limit: int,
    drawn: Sequence[tuple[Sampling, Random]],
) -> list[str]:
    device, pad_id = distributed.device(), pad_token(tokenizer)
    multiple = WIDTH_MULTIPLE if decoder.compiled else 1
    ids, mask = (t.to(device) for t in pad(encode_prompts(prompts, tokenizer), pad_id, "left", multiple))
    ends = ends_of(decoder.model, tokenizer)

    def chosen(logits: Tensor) -> Tensor:
        return torch.tensor([[one.token] for one in choose(logits, drawn)], device=device)

    if drawn:
        tokens = decoder.sampled(ids, mask, limit, ends, pad_id, chosen)
    else:
        tokens = decoder.greedy(ids, mask, limit, ends, pad_id)
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]
