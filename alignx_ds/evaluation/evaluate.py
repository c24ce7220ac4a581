"""Evaluation of systems: answers and likelihoods first, on all ranks; judgement after that, on one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import pad_token
from alignx_ds.data.inputs import EncodedData
from alignx_ds.data.rows import Row, digest
from alignx_ds.evaluation import matrix, transcripts
from alignx_ds.evaluation.endpoint import ANSWERS, Endpoint
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Judge, Metrics
from alignx_ds.evaluation.likelihood import MEASURES, perplexity_by_axis
from alignx_ds.evaluation.remote import ANSWER_SECONDS, ask
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.models.base import BaseModel
from alignx_ds.models.sharding import is_sharded
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import console, distributed, memory, signals
from alignx_ds.runtime.console import Progress

SAMPLES = 20  # answers of each system that the report prints, at least, spread over its question sets


@dataclass(frozen=True)
class QuestionSet:
    """Rows, and the judge of the answers to them. `judge` may also be one of MEASURES, which needs no answers."""

    name: str
    judge: str
    rows: list[Row]

    @property
    def needs_answers(self) -> bool:
        return self.judge not in MEASURES


@dataclass(frozen=True)
class System:
    """A model under evaluation. Its answers are reused as long as `provenance` stays the same."""

    name: str
    provenance: dict[str, Any]
    load: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Result:
    """One system's results: metrics by question set, perplexity by axis, and a few answers by question set.

    `matrix` has, by axis, the metrics of its own judge and of the others that judge the same answers. `endpoint` is the
    address of the server that gave the answers; empty where the run did.
    """

    metrics: dict[str, Metrics]
    perplexity: dict[str, float]
    samples: dict[str, list[tuple[Row, str]]]
    matrix: matrix.Cells = field(default_factory=dict)
    endpoint: str = ""


def question_sets(config: RunConfig, data: EncodedData) -> list[QuestionSet]:
    """The held-out rows of every axis that has a judge, then the extra sets of the recipe that have one."""
    axes = [QuestionSet(name, axis.judge, data.held_out[name]) for name, axis in config.axes.items() if axis.judge]
    judges = config.evaluation.judges
    return [*axes, *(QuestionSet(name, judge, data.splits.sets[name].rows) for name, judge in judges.items())]


@dataclass(frozen=True)
class Evaluation:
    """What all systems share: the settings, the base model's tokenizer, the rows, and the directory of results.

    The answers of the systems that are `served`, by their names, come from the server at `evaluation.endpoint`.
    """

    config: RunConfig
    base: BaseModel
    data: EncodedData
    out: Outputs
    served: frozenset[str] = frozenset()

    def evaluate_all(self, systems: Sequence[System]) -> None:
        """Write every system's answers, but for those that are served, and likelihoods. Collective.

        Says how many answers on disk are of no use.
        """
        distributed.on_main(lambda: self._count_answers(systems))
        answered = sum(questions.needs_answers for questions in self._question_sets())
        with console.progress("answers and likelihoods", len(systems) * (answered + 1)) as progress:
            for system in systems:
                signals.stop_if_requested("evaluation")
                self.evaluate(system, progress)

    def ask_all(self, systems: Sequence[System]) -> None:
        """Have the server answer for the systems that are served; answers on disk are kept. Raises DataError.

        Runs on one rank, after the process group has ended, like the judges.
        """
        c = self.config.evaluation
        server = Endpoint(c.endpoint, "", c.batch, ANSWER_SECONDS, max_tokens=c.max_new_tokens, names=ANSWERS)
        for questions, system in self._answered([s for s in systems if s.name in self.served]):
            file, what = self.answer_file(questions, system), f"answers of {system.name} to {questions.name}"
            ask(replace(server, model=system.name), file, what)

    def judge_all(self, systems: Sequence[System]) -> dict[str, Result]:
        """Judge the answers of every system; results by its name. Raises ConfigError if a judge can't be made.

        Runs on one rank, after the process group has ended: a judge may take hours, longer than a collective may wait.
        """
        self._count_verdicts(systems, self.judges)
        return {system.name: self.judge(system, self.judges) for system in systems}

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """All that the run has, by name. Raises ConfigError if one can't be made."""
        own = {questions.judge for questions in self._question_sets() if questions.needs_answers}
        names = sorted(own.union(matrix.cross_judges(self.config)))
        return {name: registry.make(name, self.config.judges) for name in names}

    def evaluate(self, system: System, progress: Progress) -> None:
        """Write one system's answers, unless it is served, and likelihoods. Collective.

        Those on disk with the same provenance are kept: the model is loaded only if something is missing.
        """
        model: PreTrainedModel | None = None
        settings = self.config.evaluation
        for questions in self._question_sets():
            if not questions.needs_answers:
                continue
            file = self.answer_file(questions, system)
            if system.name not in self.served and not distributed.on_main(file.is_complete):
                model = model or system.load()
                answers(
                    model,
                    self.base.tokenizer,
                    [row.chat for row in questions.rows],
                    batch=settings.batch,
                    max_new_tokens=settings.max_new_tokens,
                    compiled=settings.compile,
                    file=file,
                )
            progress.advance()
        inputs = self._likelihood_inputs(system)
        if not distributed.on_main(lambda: self._stored_likelihoods(system, inputs)):
            model = model or system.load()
            measured = self._measure(model)
            if distributed.is_main():
                text = json.dumps({"inputs": inputs, **measured}, indent=2)
                manifest.write_text(self.out.likelihoods / f"{system.name}.json", text + "\n")
        progress.advance()
        if model is not None and is_sharded(model):
            del model
            memory.free()  # its modules refer to each other

    def judge(self, system: System, judges: dict[str, Judge]) -> Result:
        """Judge the stored answers of one system, on one rank. Verdicts that are on disk already are kept."""
        measured = self._stored_likelihoods(system, self._likelihood_inputs(system))
        assert measured is not None, f"{system.name} is judged before it is evaluated"
        metrics: dict[str, Metrics] = {}
        samples, cells = {}, matrix.Cells()
        for questions in self._question_sets():
            name = questions.name
            if not questions.needs_answers:
                metrics[name] = measured["metrics"][name]
                continue
            outputs = self.answer_file(questions, system).load()
            samples[name] = self._sample(list(zip(questions.rows, outputs, strict=True)))
            for judge, numbers in self._judged_rows(questions, judges).items():
                rows, given = [questions.rows[n] for n in numbers], [outputs[n] for n in numbers]
                file = self._verdict_file(questions, system, judge)
                found = judges[judge].metrics(rows, transcripts.verdicts(file, judges[judge], rows, given))
                if judge == questions.judge:
                    metrics[name] = found
                if name in self.config.axes:
                    cells.setdefault(name, {})[judge] = found | {"rows": len(rows)}
        return Result(metrics, measured["perplexity"], samples, cells, self._endpoint(system))

    def _sample(self, answered: list[tuple[Row, str]]) -> list[tuple[Row, str]]:
        """This question set's share of SAMPLES, at even distances: files are often sorted by kind."""
        sets = sum(questions.needs_answers for questions in self._question_sets())
        return answered[:: max(1, len(answered) * sets // SAMPLES)]

    def _judged_rows(self, questions: QuestionSet, judges: dict[str, Judge]) -> dict[str, list[int]]:
        """By judge: the numbers of the rows that it judges. The own judge judges all; others where they apply."""
        found = {questions.judge: list(range(len(questions.rows)))}
        if questions.name in self.config.axes:
            for name in matrix.cross_judges(self.config):
                numbers = [n for n, row in enumerate(questions.rows) if judges[name].applies(row)]
                if numbers:
                    found.setdefault(name, numbers)
        return found

    def answer_file(self, questions: QuestionSet, system: System) -> AnswerFile:
        provenance = {
            "seed": self.config.seed,
            "model": manifest.fingerprint(system.provenance),
            "max_new_tokens": self.config.evaluation.max_new_tokens,
        }
        if endpoint := self._endpoint(system):
            provenance["endpoint"] = endpoint
        return AnswerFile(self.out.answers / f"{system.name}.{questions.name}.jsonl", questions.rows, provenance)

    def _endpoint(self, system: System) -> str:
        return self.config.evaluation.endpoint if system.name in self.served else ""

    def _verdict_file(self, questions: QuestionSet, system: System, judge: str) -> Path:
        return self.out.verdicts / f"{system.name}.{questions.name}.{judge}.jsonl"

    def _answered(self, systems: Sequence[System]) -> Iterator[tuple[QuestionSet, System]]:
        return ((q, system) for system in systems for q in self._question_sets() if q.needs_answers)

    def _count_answers(self, systems: Sequence[System]) -> None:
        files = [self.answer_file(questions, system) for questions, system in self._answered(systems)]
        there = sum(transcripts.lines(file.path) for file in files)
        if unused := there - sum(len(file.load()) for file in files):
            reason = "are of another model, server or length, or to other rows, and not used"
            console.say(f"{self.out.answers}: {unused} of {there} answers {reason}")

    def _count_verdicts(self, systems: Sequence[System], judges: dict[str, Judge]) -> None:
        there = used = 0
        for questions, system in self._answered(systems):
            outputs = self.answer_file(questions, system).load()
            for judge, numbers in self._judged_rows(questions, judges).items():
                path = self._verdict_file(questions, system, judge)
                rows, given = [questions.rows[n] for n in numbers], [outputs[n] for n in numbers if n < len(outputs)]
                there += transcripts.lines(path)
                used += len(transcripts.given(path, judges[judge], rows, given))
        if used < there:
            reason = "are of another judge, or on other answers, and not used"
            console.say(f"{self.out.verdicts}: {there - used} of {there} verdicts {reason}")

    def _question_sets(self) -> list[QuestionSet]:
        return question_sets(self.config, self.data)

    def _likelihood_inputs(self, system: System) -> dict[str, Any]:
        measured = [questions for questions in self._question_sets() if not questions.needs_answers]
        return {
            "model": manifest.fingerprint(system.provenance),
            "references": [self.config.expert_names, self.data.references.digest],
            "question_sets": {q.name: [q.judge, digest(q.rows)] for q in measured},
        }

    def _stored_likelihoods(self, system: System, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The likelihoods on disk if they were computed from these inputs, else None."""
        path = self.out.likelihoods / f"{system.name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged file is written again
            return None
        return content if isinstance(content, dict) and content.get("inputs") == inputs else None

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        config, tokenizer = self.config, self.base.tokenizer
        metrics = {
            q.name: MEASURES[q.judge](model, tokenizer, q.rows, config.evaluation.batch)
            for q in self._question_sets()
            if not q.needs_answers
        }
        perplexity = perplexity_by_axis(model, self.data.references, config, pad_token(tokenizer))
        return {"perplexity": perplexity, "metrics": metrics}
