"""Training on an objective: its loss of a micro batch, what it needs before a step, and the reference of its rows.

DeepSpeed averages micro batches and ranks. All micro batches of a step have the same number of rows, so a mean over the
rows of each is one over the step's. What depends on several rows at once (the shifts of kto and bco) is found for all
rows of the step, on all ranks, before its first backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.compared import ComparedRows
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.sampling import global_batches
from alignx_ds.runtime import distributed
from alignx_ds.training import objectives
from alignx_ds.training.engine import Plan
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import builder
from alignx_ds.training.losses import answer_log_probabilities
from alignx_ds.training.metrics import MicroBatchLoss, StepMetrics, summed
from alignx_ds.training.objectives import Settings

GOOD, PAIRS = "good", "pairs"  # shares of a micro batch's rows, among the terms
OF_ANSWERS = ("rewards/good", "rewards/bad", "log_probabilities/good", "log_probabilities/bad")


class ObjectiveLoss:
    """The loss of rows under an axis's objective.

    `at_start` computes the reference log-probabilities, with the weights that training starts from: a resumed job loads
    its checkpoint after it. No second model is held. `before_step` finds the shift. Both are collective.
    """

    def __init__(self, settings: Settings, rows: ComparedRows, plan: Plan, pad_id: int, seed: int, *, packed: bool):
        self.settings, self.plan, self.builder = settings, plan, partial(builder, pad_id=pad_id, packed=packed)
        self.bad_weight = settings.bad_weight or sum(rows.good) / max(1, len(rows.good) - sum(rows.good))
        self._give(rows, {i for chosen in global_batches(len(rows), plan.batch, plan.steps, seed) for i in chosen})

    def _give(self, rows: ComparedRows, used: Iterable[int]) -> None:
        """Set the rows, and the numbers of those of them whose reference will be needed."""
        self.rows, self.used = rows, sorted(used)
        self.build = self.builder(rows.examples)
        self.build_mismatched = self.builder(LabelledExamples(rows.mismatched, [0] * len(rows.mismatched)))
        device = distributed.device()
        self.good = torch.tensor(rows.good, device=device).float()
        self.is_pair = 1 - torch.tensor(rows.alone or [False] * len(rows), device=device).float()
        self.weights = torch.tensor(rows.weights, device=device)
        self.reference = self.reference_mismatched = torch.zeros(0)
        self.shift = torch.zeros((), device=device)

    def on(self, rows: ComparedRows) -> ObjectiveLoss:
        """The same loss of other rows, all of which are used."""
        made = copy(self)
        made._give(rows, range(len(rows)))
        return made

    def of_job(self, job: TrainingJob) -> TrainingJob:
        """The job, with what this loss does at its start and before its steps, and what it logs."""
        return replace(job, at_start=self.at_start, before_step=self.before_step, scalars=self.scalars)

    def at_start(self, engine: Any) -> None:
        """Keep the log-probabilities of all answers that the job will see, [rows, answers of a row] fp32."""
        if self.settings.has_reference:
            self.reference = self._of_all(engine, self.build, 1 + self.settings.paired)
        if self.rows.mismatched:
            self.reference_mismatched = self._of_all(engine, self.build_mismatched, 1)[:, 0]

    @torch.no_grad()
    def _of_all(self, engine: Any, build: Callable[..., MicroBatch], answers: int) -> Tensor:
        """Every rank makes as many forward passes as the others: under ZeRO-3 they work together."""
        world, size = distributed.world_size(), self.plan.micro_batch(distributed.world_size())
        parts = [tuple(self.used[first : first + size]) for first in range(0, len(self.used), size)]
        parts += parts[:1] * (-len(parts) % world)
        engine.eval()
        found = []
        for numbers in parts[distributed.rank() :: world]:
            part = build(numbers, 1.0)
            found.append((numbers, answer_log_probabilities(engine.module, part.batch, len(part.examples)).cpu()))
        engine.train()
        reference = torch.full((len(self.rows), answers), torch.nan)
        for numbers, values in (entry for share in distributed.gather(found) for entry in share):
            reference[list(numbers)] = values.view(answers, -1).T
        return reference.to(distributed.device())

    @torch.no_grad()
    def before_step(self, engine: Any, parts: list[MicroBatch]) -> None:
        """Set the shift z₀ of kto or δ of bco for the step, from all of its rows."""
        if self.settings.name == "kto":
            ratios = [self._mismatched_ratio(engine, part.numbers) for part in parts]
            total, count = summed([torch.cat(ratios).sum(), len(torch.cat(ratios))])
            self.shift = (total / count).clamp(min=0)
        elif self.settings.name == "bco":
            numbers = torch.tensor([n for part in parts for n in part.numbers], device=self.good.device)
            answers = [answer_log_probabilities(engine.module, part.batch, len(part.numbers)) for part in parts]
            rewards, good = self.settings.beta * (torch.cat(answers) - self.reference[numbers, 0]), self.good[numbers]
            sums = summed([(rewards * good).sum(), (rewards * (1 - good)).sum(), good.sum(), (1 - good).sum()])
            self.shift = (sums[:2] / sums[2:].clamp(min=1)).sum() / (sums[2:] > 0).sum()

    def _mismatched_ratio(self, engine: Any, numbers: Sequence[int]) -> Tensor:
        part = self.build_mismatched(tuple(numbers), 1.0)
        found = answer_log_probabilities(engine.module, part.batch, len(part.examples))
        return found - self.reference_mismatched[list(numbers)]

    def __call__(self, engine: Any, part: MicroBatch) -> MicroBatchLoss:
        """The mean over the micro batch's rows, and the good answers' NLL per token of the step where it is asked for.

        The terms: rewards and log-probabilities of good and of bad answers, and how often a reward is right.
        """
        answers = answer_log_probabilities(engine, part.batch, len(part.examples))
        lengths = answers.new_tensor([example.learned_length for example in part.examples])
        if self.settings.paired:
            return self._of_pairs(part, answers.view(2, -1), lengths.view(2, -1))
        return self._of_verdicts(part, answers, lengths)

    def _of_pairs(self, part: MicroBatch, answers: Tensor, lengths: Tensor) -> MicroBatchLoss:
        """answers, lengths [2, B]: of the good ones and of the bad ones. One that is alone counts by its NLL only.

        Terms of answers are sums over the pairs divided by B; see `scalars`.
        """
        s, (good, bad) = self.settings, answers
        numbers = list(part.numbers[: len(good)])
        is_pair = self.is_pair[numbers]
        if s.name == "dpo":
            reference = self.reference[numbers].T
            losses = objectives.dpo(good, bad, reference[0], reference[1], s.beta)
            rewards = s.beta * (answers.detach() - reference)
        else:
            per_token = answers / lengths
            rewards = s.beta * per_token.detach()
            if s.name == "orpo":
                losses = objectives.orpo(per_token[0], per_token[1], s.beta)
            else:
                losses = objectives.simpo(per_token[0], per_token[1], s.beta, s.margin)
        loss, nll = (losses * is_pair).mean(), -good.sum() * part.lm_scale
        margin = rewards[0] - rewards[1]
        accuracy = (margin > 0).float()
        shares = [(values * is_pair).mean() for values in (*rewards, *answers.detach(), margin, accuracy)]
        terms = dict(zip((*OF_ANSWERS, "rewards/margin", "rewards/accuracy"), shares, strict=True))
        terms |= {PAIRS: is_pair.mean(), "objective": loss.detach(), "nll": nll.detach()}
        return MicroBatchLoss(loss + s.sft_weight * nll if s.sft_weight else loss, terms)

    def _of_verdicts(self, part: MicroBatch, answers: Tensor, lengths: Tensor) -> MicroBatchLoss:
        """answers, lengths [B]. Terms of good and of bad answers are sums over those divided by B; see `scalars`."""
        s, numbers = self.settings, list(part.numbers)
        reference = self.reference[numbers, 0]
        if s.name == "poft":
            losses = objectives.poft(answers / lengths, reference / lengths, s.beta)
            ratio = (answers - reference).detach()
            return MicroBatchLoss(
                losses.mean(), {"rewards/good": ratio.mean(), "log_probabilities/good": answers.detach().mean()}
            )
        good = self.good[numbers]
        if s.name == "kto":
            losses = objectives.kto(answers, reference, good, self.shift, s.beta, self.bad_weight)
            threshold = s.beta * self.shift
        else:
            losses = objectives.bco(answers, reference, good, self.shift, s.beta, self.weights[numbers])
            threshold = self.shift
        found, rewards = answers.detach(), s.beta * (answers.detach() - reference)
        shares = [(values * which).mean() for values in (rewards, found) for which in (good, 1 - good)]
        terms = dict(zip(OF_ANSWERS, shares, strict=True)) | {
            GOOD: good.mean(),
            "rewards/accuracy": ((rewards > threshold) == good.bool()).float().mean(),
            "rewards/shift": threshold,
        }
        return MicroBatchLoss(losses.mean(), terms)

    def scalars(self, metrics: StepMetrics) -> dict[str, float]:
        """What is logged of a step: means over its pairs, or over its good and over its bad answers."""
        found = metrics.scalars()
        if PAIRS in found:
            return _averaged(found, dict.fromkeys(("good", "bad", "margin", "accuracy"), found.pop(PAIRS)))
        if GOOD not in found:
            return found
        good = found.pop(GOOD)
        found = _averaged(found, {"good": good, "bad": 1 - good})
        return found | {"rewards/margin": found["rewards/good"] - found["rewards/bad"]}


def _averaged(terms: dict[str, float], shares: dict[str, float]) -> dict[str, float]:
    """Each term over the share of the rows that it is of, which the last part of its name says; NaN without any."""
    of = {name: shares.get(name.rpartition("/")[2], 1.0) for name in terms}
    return {name: value / of[name] if of[name] else torch.nan for name, value in terms.items()}
