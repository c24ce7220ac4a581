"""What a model thinks of given answers: perplexity, multiple choice and preferences. No judge, no generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.batches import IGNORED, collate
from alignx_ds.data.encode import Example, encode, pad_token
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.judges.protocol import Metrics, percent
from alignx_ds.runtime import distributed


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: log-probability (natural) summed over its tokens, the closing one included, and their number."""

    log_probability: float
    tokens: int

    @property
    def per_token(self) -> float:
        return self.log_probability / self.tokens


@torch.no_grad()
def likelihoods(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch: int) -> list[Likelihood]:
    """One per example, in order, on every rank. An aligned model routes by the prompt alone. Collective."""
    model.eval()
    own = distributed.rank_share(list(range(len(examples))))
    by_length = sorted(own, key=lambda i: len(examples[i].ids))
    found: dict[int, Likelihood] = {}
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        summed = _summed(model, [examples[i] for i in chosen], pad_id)
        found |= {i: Likelihood(float(s), examples[i].answer_length) for i, s in zip(chosen, summed, strict=True)}
    return distributed.interleave(distributed.gather([found[i] for i in own]))


def _summed(model: PreTrainedModel, examples: list[Example], pad_id: int) -> Tensor:
    b = collate(examples, pad_id).to(distributed.device())
    routed = {"prompt_mask": b.prompt_mask} if model.config.model_type == "alignx" else {}
    logits = model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False, **routed).logits
    labels = b.labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(labels.shape).double().sum(1)


def perplexity(answers: Sequence[Likelihood]) -> float:
    """exp of the mean NLL over all answer tokens."""
    return math.exp(-sum(a.log_probability for a in answers) / sum(a.tokens for a in answers))


Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Row], int], Metrics]


def multiple_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch: int) -> Metrics:
    """TruthfulQA's MC1 and MC2 (Lin et al. 2022), in percent, zero-shot under the model's own template. Collective.

    MC1: how often the best answer is likelier than every incorrect one. MC2: the probability of the correct answers
    among all answers, on average. `score` is MC2.
    """
    whole = [r for r in rows if r.correct and r.incorrect]
    choices = [[Row(r.prompt, a) for a in (r.response, *r.correct, *r.incorrect)] for r in whole]
    found = _of_rows(model, tokenizer, choices, batch)
    first, second = [], []
    for row, seen in zip(whole, found, strict=True):
        best, correct, incorrect = seen[0], seen[1 : 1 + len(row.correct)], seen[1 + len(row.correct) :]
        first.append(best.log_probability > max(a.log_probability for a in incorrect))
        logs = torch.tensor([a.log_probability for a in (*correct, *incorrect)], dtype=torch.float64)
        second.append(float(logs.softmax(0)[: len(correct)].sum()))
    mc2 = 100.0 * sum(second) / len(second) if second else 0.0
    return {"score": mc2, "mc1": percent(first), "mc2": mc2, "questions": float(len(whole))}


def preference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch: int) -> Metrics:
    """How often the chosen answer is likelier than the rejected one, per token and in total, in percent. Collective."""
    pairs = [[Row(r.prompt, r.response), Row(r.prompt, r.rejected)] for r in rows if r.response and r.rejected]
    found = _of_rows(model, tokenizer, pairs, batch)
    per_token = percent([chosen.per_token > rejected.per_token for chosen, rejected in found])
    total = percent([chosen.log_probability > rejected.log_probability for chosen, rejected in found])
    return {"score": per_token, "per_token": per_token, "in_total": total, "pairs": float(len(pairs))}


def _of_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: list[list[Row]], batch: int
) -> list[list[Likelihood]]:
    examples = encode([row for group in groups for row in group], tokenizer)
    flat = likelihoods(model, examples, pad_token(tokenizer), batch)
    edges = [0]
    for group in groups:
        edges.append(edges[-1] + len(group))
    return [flat[a:b] for a, b in pairwise(edges)]


MEASURES: dict[str, Measure] = {"mc": multiple_choice, "preference": preference}
