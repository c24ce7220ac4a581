"""Likelihoods of given answers, and the metrics made of them: perplexity, multiple choice, preference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.batches import Batch, collate
from alignx_ds.data.encode import Example, LabelledExamples, encode, pad_token
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.judges.protocol import Metrics, percent
from alignx_ds.runtime import distributed
from alignx_ds.training.losses import forward_each_nll


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: the natural logarithm of its probability, and its number of tokens, the end token included."""

    log_probability: float
    tokens: int

    @property
    def per_token(self) -> float:
        return self.log_probability / self.tokens


@torch.no_grad()
def likelihoods(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, batch: int) -> list[Likelihood]:
    """Of each example's answer given its prompt, in order, the same list on every rank. Collective.

    Examples are batched by length, which saves padding. An aligned model routes by the prompt alone.
    """
    model.eval()
    own = distributed.rank_share(list(range(len(examples))))
    by_length = sorted(own, key=lambda i: len(examples[i].ids))
    computed: dict[int, Likelihood] = {}
    for chosen, _ in distributed.lockstep(by_length, batch, len(examples), 0):
        batched = collate([examples[i] for i in chosen], pad_id).to(distributed.device())
        sums = log_probabilities(model, batched)
        computed |= {i: Likelihood(float(s), examples[i].answer_length) for i, s in zip(chosen, sums, strict=True)}
    return distributed.interleave(distributed.gather([computed[i] for i in own]))


def log_probabilities(model: PreTrainedModel, b: Batch) -> Tensor:
    """Of the answer in each line of a batch, summed over its tokens (nats): [B] float64."""
    routed = {"prompt_mask": b.prompt_mask} if model.config.model_type == "alignx" else {}
    inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "use_cache": False, **routed}
    each = forward_each_nll(model, b, **inputs).double()
    rows = b.predicting // b.labels.shape[1]  # of each answer token
    return -each.new_zeros(len(b.labels)).index_add(0, rows, each)


def perplexity(answers: Sequence[Likelihood]) -> float:
    """exp of the mean NLL over all answer tokens; needs at least one answer."""
    return math.exp(-sum(a.log_probability for a in answers) / sum(a.tokens for a in answers))


def perplexity_by_axis(
    model: PreTrainedModel, references: LabelledExamples, config: RunConfig, pad_id: int
) -> dict[str, float]:
    """Perplexity of the reference answers of every axis that has some. Collective."""
    by_axis: dict[str, list[Likelihood]] = {axis: [] for axis in config.axes}
    computed = likelihoods(model, references.examples, pad_id, config.evaluation.batch)
    for expert, likelihood in zip(references.experts, computed, strict=True):
        if config.expert_names[expert] in by_axis:  # the generalist is no axis
            by_axis[config.expert_names[expert]].append(likelihood)
    return {axis: perplexity(answers) for axis, answers in by_axis.items() if answers}


Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Row], int], Metrics]


def multiple_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch: int) -> Metrics:
    """TruthfulQA's MC1 and MC2 (Lin et al. 2022), in percent, zero-shot under the model's own template. Collective.

    MC1: share of questions whose best answer is likelier than every incorrect one. MC2: the probability of the correct
    answers among all answers, averaged over questions. `score` is MC2. Rows without both kinds of answers are left out.
    """
    usable = [r for r in rows if r.correct and r.incorrect]
    choices = [[replace(r, response=a) for a in (r.response, *r.correct, *r.incorrect)] for r in usable]
    hits, shares = [], []
    for row, answers in zip(usable, _by_group(model, tokenizer, choices, batch), strict=True):
        best, correct, incorrect = answers[0], answers[1 : 1 + len(row.correct)], answers[1 + len(row.correct) :]
        hits.append(best.log_probability > max(a.log_probability for a in incorrect))
        logs = torch.tensor([a.log_probability for a in (*correct, *incorrect)], dtype=torch.float64)
        shares.append(float(logs.softmax(0)[: len(correct)].sum()))
    mc2 = 100.0 * sum(shares) / len(shares) if shares else 0.0
    return {"score": mc2, "mc1": percent(hits), "mc2": mc2, "questions": float(len(usable))}


def preference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch: int) -> Metrics:
    """Share of pairs whose chosen answer is likelier than the rejected one, in percent. Collective.

    `per_token`, which is the `score`, compares mean log-probabilities of the tokens; `in_total` compares their sums.
    """
    pairs = [[r, replace(r, response=r.rejected)] for r in rows if r.response and r.rejected]
    compared = _by_group(model, tokenizer, pairs, batch)
    per_token = percent([chosen.per_token > rejected.per_token for chosen, rejected in compared])
    total = percent([chosen.log_probability > rejected.log_probability for chosen, rejected in compared])
    return {"score": per_token, "per_token": per_token, "in_total": total, "pairs": float(len(pairs))}


def _by_group(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: list[list[Row]], batch: int
) -> list[list[Likelihood]]:
    """The likelihoods of every row's response, grouped as the rows are."""
    examples = encode([row for group in groups for row in group], tokenizer)
    flat = likelihoods(model, examples, pad_token(tokenizer), batch)
    edges = [0]
    for group in groups:
        edges.append(edges[-1] + len(group))
    return [flat[a:b] for a, b in pairwise(edges)]


MEASURES: dict[str, Measure] = {"mc": multiple_choice, "preference": preference}
