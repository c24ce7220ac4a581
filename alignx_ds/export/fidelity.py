"""How far an exported model's predictions are from the aligned model's, on the aligned model's own answers.

Shapes: B rows, T tokens, V vocabulary, N predictions, one for every token of every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.batches import IGNORED, Batch, collate, pad
from alignx_ds.data.chats import Prompt
from alignx_ds.data.encode import Example, encode_prompts, pad_token
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.layer import alignx_layers, output_calibrations
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.ends import ends_of
from alignx_ds.runtime import distributed

BATCH = 8  # texts in one forward pass
Predict = Callable[[Batch], Tensor]  # the logits [B, T, V] of a batch


@dataclass(frozen=True)
class Fidelity:
    """A difference over all predicted tokens of the answers to some prompts."""

    prompts: int
    tokens: int
    error: float  # ‖z − z′‖ / ‖z′‖, where z′ are the aligned model's logits
    agreement: float  # share of tokens for which both models predict the same one

    def __str__(self) -> str:
        return f"relative logits error {self.error:.2e}, token agreement {self.agreement:.4f} ({self.tokens} tokens)"


def answered(
    model: AlignXForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], limit: int
) -> list[Example]:
    """Each prompt with the model's own greedy answer, of 1 to `limit` tokens."""
    decoder, pad_id, ends = Decoder(model), pad_token(tokenizer), ends_of(model, tokenizer)
    examples: list[Example] = []
    for start in range(0, len(prompts), BATCH):
        asked = encode_prompts(list(prompts[start : start + BATCH]), tokenizer)
        ids, mask = (t.to(distributed.device()) for t in pad(asked, pad_id, "left"))
        answers = decoder.greedy(ids, mask, limit, ends, pad_id).tolist()
        examples += [Example((*p, *_until(a, ends)), len(p)) for p, a in zip(asked, answers, strict=True)]
    return examples


def _until(answer: list[int], ends: Sequence[int]) -> list[int]:
    """The answer with its end token, without what follows it."""
    last = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: last + 1]


def plain(model: PreTrainedModel) -> Predict:
    """Any causal language model's predictions."""
    return lambda b: model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False).logits


def routed(model: AlignXForCausalLM, weights: Sequence[float] | None = None) -> Predict:
    """An aligned model's predictions, routed by the prompt alone; or every row with these weights of the axes."""

    def predict(b: Batch) -> Tensor:
        forced = None
        if weights is not None:
            gates = torch.tensor([1.0 - sum(weights), *weights], device=b.input_ids.device)
            forced = gates.expand(len(b.input_ids), -1)
        logits: Tensor = model(b.input_ids, b.attention_mask, b.prompt_mask, forced, use_cache=False).logits
        return logits

    return predict


@contextmanager
def without_calibration(model: AlignXForCausalLM) -> Iterator[None]:
    """Within it the layers return the mixture's output y instead of the calibrated ỹ."""
    reinjections = [calibration.reinjection for calibration in output_calibrations(model)]
    before = [r.detach().clone() for r in reinjections]
    with torch.no_grad():
        for r in reinjections:
            r.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for r, value in zip(reinjections, before, strict=True):
                r.copy_(value)


@contextmanager
def mixing_weights(model: AlignXForCausalLM) -> Iterator[None]:
    """Within it the layers mix the weights of experts, whatever `gate.combine` says."""
    mixtures = [layer.mixture for layer in alignx_layers(model) if isinstance(layer.mixture, FusedMixture)]
    before = [mixture.merge for mixture in mixtures]
    for mixture in mixtures:
        mixture.merge = True
    try:
        yield
    finally:
        for mixture, merge in zip(mixtures, before, strict=True):
            mixture.merge = merge


@torch.no_grad()
def compare(candidate: Predict, reference: Predict, examples: Sequence[Example], pad_id: int) -> Fidelity:
    """The candidate's predictions of the answers' tokens against the reference's."""
    squared_error = squared_norm = 0.0
    same = tokens = 0
    for start in range(0, len(examples), BATCH):
        batch = collate(list(examples[start : start + BATCH]), pad_id).to(distributed.device())
        answered = batch.labels[:, 1:] != IGNORED
        theirs, ours = (model(batch)[:, :-1][answered].double() for model in (reference, candidate))  # [N, V]
        squared_error += float((ours - theirs).square().sum())
        squared_norm += float(theirs.square().sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ours)
    return Fidelity(
        len(examples), tokens, (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0, same / max(1, tokens)
    )
