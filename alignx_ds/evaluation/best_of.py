"""Best-of-n: n answers are drawn to every prompt, and the one that the scorers rate best is kept.

A scorer is a judge, and its reward of an answer is its score of that answer alone. The rewards of different scorers are
not comparable, so each is calibrated first, as in InfAlign (Balashankar et al. 2025, arXiv 2412.19792): to the share of
answers to the same prompt, by the model that draws, that it is better than, those that are as good counted half. The n
answers themselves stand for the model's, so nothing more is drawn; an answer's own half is the same for all. Then the
weighted sum decides. With one scorer calibration changes nothing, because it keeps the order. InfAlign's second part,
a transformed reward for reinforcement learning, is not here: nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.encode import Example, LabelledExamples, encode_prompts, pad_token
from alignx_ds.data.rows import Row
from alignx_ds.evaluation import transcripts
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges.protocol import Graded, Judge, Verdict
from alignx_ds.evaluation.sampling import Sampling
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.mocae.gate import need_logits
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.gate_terms import gate_terms, sum_of

Rewards = Mapping[str, Sequence[float]]  # of the n answers to one prompt, by scorer
Weights = Mapping[str, float]  # of the scorers, or of the axes


@dataclass(frozen=True)
class Drawing:
    """How the n answers to a prompt are drawn. The first of them are the same for every n."""

    n: int
    temperature: float = 1.0  # 1: from the model itself; 0: n times the greedy answer
    seed: int = 0

    @property
    def provenance(self) -> dict[str, Any]:
        return {"drawn": self.n, "temperature": self.temperature, "seed": self.seed}

    def repeated(self, rows: Sequence[Row]) -> list[Row]:
        """Every row n times: those of its answers, one after the other."""
        return [row for row in rows for _ in range(self.n)]

    def draw(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        *,
        batch: int,
        max_new_tokens: int,
        file: AnswerFile | None = None,
    ) -> list[str]:
        """n answers to each row, in the order of `repeated`; those that the `file` holds are kept. Collective."""

        def draws(number: int) -> tuple[Sampling, Random]:
            sampling = Sampling(self.temperature)
            return sampling, Random(f"{self.seed}/{rows[number // self.n].question}/{number % self.n}")

        prompts = [row.chat for row in self.repeated(rows)]
        return answers(model, tokenizer, prompts, batch=batch, max_new_tokens=max_new_tokens, file=file, draws=draws)


def reward(judge: Judge, row: Row, verdict: Verdict) -> float:
    """0–100, higher is better: the judge's score of this one answer, or its grade where the score is coarser."""
    return judge.grade(verdict) if isinstance(judge, Graded) else judge.metrics([row], [verdict])["score"]


def rewards(
    judges: Mapping[str, Judge], rows: Sequence[Row], drawn: Sequence[str], file: Callable[[str], Path] | None = None
) -> list[dict[str, list[float]]]:
    """By row: the rewards of its answers, by the scorers that apply to it. Every row has the same number of answers.

    With `file`, a scorer's verdicts are stored in its file, and those that are there are not made again.
    """
    n = len(drawn) // len(rows)
    found: list[dict[str, list[float]]] = [{} for _ in rows]
    for name, judge in judges.items():
        numbers = [i for i, row in enumerate(rows) if judge.applies(row)]
        asked = [rows[i] for i in numbers for _ in range(n)]
        given = [drawn[i * n + k] for i in numbers for k in range(n)]
        verdicts = transcripts.verdicts(file(name), judge, asked, given) if file else judge.verdicts(asked, given)
        values = [reward(judge, row, verdict) for row, verdict in zip(asked, verdicts, strict=True)]
        for place, i in enumerate(numbers):
            found[i][name] = values[place * n : (place + 1) * n]
    return found


def calibrated(rewards: Sequence[float]) -> list[float]:
    """Each one's quantile among all of them, equal ones counted half; their mean is ½."""
    return [sum((r > other) + 0.5 * (r == other) for other in rewards) / len(rewards) for r in rewards]


def best(rewards: Rewards, weights: Weights) -> int:
    """The number of the answer with the largest weighted sum of calibrated rewards: the first of equal ones.

    Without a scorer that applies, or with weights of zero alone, that is the first answer.
    """
    used = {name: calibrated(values) for name, values in rewards.items()}
    sums = [
        sum(weights[name] * value for name, value in zip(used, one, strict=True))
        for one in zip(*used.values(), strict=True)
    ]
    return max(range(len(sums)), key=sums.__getitem__, default=0)


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n, in nats: at most so far is best-of-n from the model that draws (Beirami et al. 2024).

    Where several answers are equally good it is nearer (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def needs_by_gate(
    model: AlignXForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch: int
) -> list[Weights]:
    """By row and axis, by the lowest gate: the probability that the prompt needs it, or in a choice that it is right.

    Collective.
    """
    prompts = [Example(tuple(ids), len(ids)) for ids in encode_prompts([row.chat for row in rows], tokenizer)]
    terms = gate_terms(model, LabelledExamples(prompts, [0] * len(prompts)), pad_token(tokenizer), batch)
    layer, gate = next(iter(gates_of(model).items()))
    logits = sum_of(terms[layer]) / gate.calibration_temperature.float().cpu()
    p = need_logits(logits).sigmoid() if gate.settings.kind == "needs" else logits.softmax(-1)[:, 1:]
    return [dict(zip(model.config.experts[1:], values, strict=True)) for values in p.tolist()]
