"""The decision of every gate about a prompt, term by term, and the words that its lexical term comes from.

In a choice the candidates are the experts, compared with the runner-up. In needs they are the axes, each compared with
the generalist: terms are differences from the generalist's, and the logit is the log-odds that the axis is needed.
"""

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
NEEDED = 0.5  # an axis that is at least as likely to be needed counts as needed


@dataclass(frozen=True)
class Candidate:
    """An expert, with its logit and gate; in needs an axis, with terms and logit less the generalist's."""

    name: str
    parts: dict[str, float]  # the terms of its logit, before the post-hoc temperature
    logit: float  # the sum of the terms, divided by the temperature
    confidence: float  # softmax of the logits; in needs the probability that the axis is needed
    gate: float  # its weight in the output; 0 for all but the best `gate.top_k`


@dataclass(frozen=True)
class Word:
    """A token or a pair of adjacent tokens, and what it adds to the chosen expert's margin."""

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
    kind: str = "choice"  # or needs

    @property
    def serving(self) -> list[Candidate]:
        """The experts that serve the prompt; in needs, the axes that are needed and served."""
        return [c for c in self.candidates if c.gate > 0 and (self.kind == "choice" or c.confidence >= NEEDED)]

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def runner_up(self) -> Candidate | None:
        """The second of a choice; in needs the axes do not compete."""
        return self.candidates[1] if len(self.candidates) > 1 and self.kind == "choice" else None

    @cached_property
    def entropy(self) -> float:
        """Of the decision, in bits: 0 when it is certain, `most_entropy` when all confidences are equal (needs: ½)."""
        shares = [c.confidence for c in self.candidates]
        if self.kind == "needs":
            shares += [1 - share for share in shares]
        return sum(-share * math.log2(share) for share in shares if share > 0)

    @property
    def most_entropy(self) -> float:
        return float(len(self.candidates)) if self.kind == "needs" else math.log2(len(self.candidates))

    def margins(self) -> dict[str, float]:
        """By term, before the post-hoc temperature: the margin of the chosen expert over the runner-up, or in needs
        that of the axis that is needed most over the generalist."""
        if self.kind == "needs":
            return self.chosen.parts
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
    needs = gate.settings.kind == "needs"
    parts = {term: part[0] for term, part in gate.parts(model.routing.queries[layer]).items()}
    logits, confidence = decision.logits[0], decision.probabilities()[0]
    if needs:
        parts, logits = {term: part - part[0] for term, part in parts.items()}, logits - logits[0]
        confidence = torch.cat([confidence[:1], decision.needs()[0]])
    present = [e for e in range(needs, len(names)) if gate.geometry.present[e]]
    order = sorted(present, key=lambda e: -float(logits[e]))
    words, others = [], 0.0
    if needs or len(order) > 1:
        weight, bias, other = gate.settings.lexical, model.lexicon.bias.float(), 0 if needs else order[1]
        kept = float(gate.geometry.present[other])  # a generalist without rows has no score to subtract
        words = _words(texts, weight * (shares[order[0]] - kept * shares[other]))
        others = weight * float(bias[order[0]] - kept * bias[other]) + sum(word.pull for word in words[MOST_WORDS:])
    return Choice(
        layer=layer,
        layers=[user.index for user in alignx_layers(model) if user.gate_layer == layer],
        temperature=float(gate.calibration_temperature),
        candidates=[
            Candidate(
                names[e],
                {term: float(part[e]) for term, part in parts.items()},
                float(logits[e]),
                float(confidence[e]),
                float(decision.gates[0, e]),
            )
            for e in order
        ],
        never=[name for e, name in enumerate(names) if not gate.geometry.present[e]],
        words=words[:MOST_WORDS],
        other_words=others,
        kind=gate.settings.kind,
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
