"""Greedy answers from any causal LM, base, specialist or aligned. The prompts are spread over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.batches import pad
from alignx_ds.data.chats import Prompt
from alignx_ds.data.encode import encode_prompts, pad_token
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.models.ends import ends_of
from alignx_ds.runtime import distributed, signals

WIDTH_MULTIPLE = 64  # prompts of compiled steps are padded to a multiple of this: every new width is compiled anew


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch: int,
    max_new_tokens: int,
    compiled: bool = False,
    file: AnswerFile | None = None,
) -> list[str]:
    """One greedy answer per prompt, in order, the same list on every rank. Collective.

    The prompts get no system prompt, so they carry no hint of their axis. With `file`, answers that it holds are not
    generated again, and every new batch is appended to it at once.
    """
    done: list[str] = distributed.on_main(lambda: file.load() if file is not None else [])
    step, decoder = batch * distributed.world_size(), Decoder(model, compiled=compiled)
    for start in range(len(done), len(prompts), step):
        signals.stop_if_requested(f"answers, after {start} of {len(prompts)}")
        own = distributed.rank_share(list(prompts[start : start + step]))
        taking_part = own or list(prompts[:1] if decoder.lockstep else [])
        made = _decode(decoder, tokenizer, taking_part, max_new_tokens) if taking_part else []
        part = distributed.interleave(distributed.gather(made[: len(own)]))
        if file is not None and distributed.is_main():
            file.append(start, part)
        done = [*done, *part]
    return done


def _decode(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], limit: int) -> list[str]:
    device, pad_id = distributed.device(), pad_token(tokenizer)
    multiple = WIDTH_MULTIPLE if decoder.compiled else 1
    ids, mask = pad(encode_prompts(prompts, tokenizer), pad_id, "left", multiple)
    tokens = decoder.greedy(ids.to(device), mask.to(device), limit, ends_of(decoder.model, tokenizer), pad_id)
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]
