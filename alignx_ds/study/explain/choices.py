"""The decision of every gate about a prompt, term by term, and the words that its lexical term comes from."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import encode_prompts
from alignx_ds.mocae.gate import CalibratedGate
from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM

MOST_WORDS = 8  # words that are listed; the others are summed


@dataclass(frozen=True)
class Candidate:
    """An expert, with its logit and gate."""

    name: str
    parts: dict[str, float]  # the terms of its logit, before the post-hoc temperature
    logit: float  # the sum of the terms, divided by the temperature
    confidence: float  # softmax of the logits
    gate: float  # its weight in the output; 0 for all but the best `gate.top_k`


@dataclass(frozen=True)
class Word:
    """A token or a pair of adjacent tokens, and what it adds to the chosen expert's margin over the runner-up."""

    text: str
    pull: float  # in the lexical term, before the post-hoc temperature


@dataclass(frozen=True)
class Choice:
    """One gate's decision about one prompt."""

    layer: int
    layers: list[int]  # the layers that use the decision
    temperature: float  # post-hoc
    candidates: list[Candidate]  # by falling confidence
    never: list[str]  # experts without training rows, which no gate can choose
    words: list[Word]  # by falling absolute contribution
    other_words: float  # the contribution of all other words and of the lexicon's bias

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def runner_up(self) -> Candidate | None:
        return self.candidates[1] if len(self.candidates) > 1 else None

    @cached_property
    def entropy(self) -> float:
        """Of the confidences, in bits: 0 when one is 1, `most_entropy` when all are equal."""
        return sum(-c.confidence * math.log2(c.confidence) for c in self.candidates if c.confidence > 0)

    @property
    def most_entropy(self) -> float:
        return math.log2(len(self.candidates))

    def margins(self) -> dict[str, float]:
        """The chosen expert's margin over the runner-up by term, before the post-hoc temperature."""
        if self.runner_up is None:
            return {}
        return {term: part - self.runner_up.parts[term] for term, part in self.chosen.parts.items()}


@torch.no_grad()
def choices(model: AlignXForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[Choice]:
    """The decision of every gate, the lowest layer's first; the prompt is encoded as for generation."""
    ids = torch.tensor(encode_prompts([prompt], tokenizer), device=model.device)
    model.eval()(ids, use_cache=False)
    shares = model.lexicon.shares(ids, model.routing.query_mask)[:, 0]
    texts = _texts(ids[0].tolist(), tokenizer)
    return [_choice(model, layer, gate, shares, texts) for layer, gate in gates_of(model).items()]


def _choice(model: AlignXForCausalLM, layer: int, gate: CalibratedGate, shares: Tensor, texts: list[str]) -> Choice:
    names, decision = model.config.experts, model.routing.decisions[layer]
    parts = {term: part[0].tolist() for term, part in gate.parts(model.routing.queries[layer]).items()}
    confidence = decision.probabilities()[0].tolist()
    present = [e for e in range(len(names)) if gate.geometry.present[e]]
    order = sorted(present, key=lambda e: -confidence[e])
    words, others = [], 0.0
    if len(order) > 1:
        weight, bias = gate.settings.lexical, model.lexicon.bias.float()
        words = _words(texts, weight * (shares[order[0]] - shares[order[1]]))
        others = weight * float(bias[order[0]] - bias[order[1]]) + sum(word.pull for word in words[MOST_WORDS:])
    return Choice(
        layer=layer,
        layers=[other.index for other in alignx_layers(model) if other.gate_layer == layer],
        temperature=float(gate.calibration_temperature),
        candidates=[
            Candidate(
                names[e],
                {term: part[e] for term, part in parts.items()},
                float(decision.logits[0, e]),
                confidence[e],
                float(decision.gates[0, e]),
            )
            for e in order
        ],
        never=[name for e, name in enumerate(names) if e not in present],
        words=words[:MOST_WORDS],
        other_words=others,
    )


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every token, then of every pair of adjacent tokens, in the order of `Lexicon.shares`."""
    pairs = [[a, b] for a, b in pairwise(ids)]
    return [tokenizer.decode(piece) for piece in ([i] for i in ids)] + [tokenizer.decode(pair) for pair in pairs]


def _words(texts: list[str], contributions: Tensor) -> list[Word]:
    """Each text once, summed over its occurrences; texts that contribute nothing are left out."""
    total: dict[str, float] = defaultdict(float)
    for text, pull in zip(texts, contributions.tolist(), strict=True):
        total[text] += pull
    found = [Word(text, pull) for text, pull in total.items() if pull]
    return sorted(found, key=lambda word: -abs(word.pull))
