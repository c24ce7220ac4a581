"""What one system says and thinks: its answers to every judged set, and the likelihoods that need no judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import pad_token
from alignx_ds.data.inputs import EncodedData
from alignx_ds.data.rows import Row, digest
from alignx_ds.evaluation import transcripts
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Figures, Judge
from alignx_ds.evaluation.likelihood import MEASURES, Likelihood, likelihoods, perplexity
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import console, distributed, signals
from alignx_ds.runtime.console import Progress


@dataclass(frozen=True)
class Exam:
    """A set of rows, and who judges the answers to them: a judge, or a measure of likelihood."""

    name: str
    judge: str
    rows: list[Row]

    @property
    def is_answered(self) -> bool:
        return self.judge not in MEASURES


@dataclass(frozen=True)
class System:
    """`identity` is everything that its answers depend on beside the question."""

    name: str
    identity: dict[str, Any]
    build: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Result:
    """By axis and set: the figures; by axis that has references: their perplexity; and a few answers to look at."""

    figures: dict[str, Figures]
    perplexity: dict[str, float]
    samples: dict[str, list[tuple[Row, str]]]


def exams(config: RunConfig, data: EncodedData) -> list[Exam]:
    """One per judged axis, on its held-out rows, and one per extra set."""
    axes = [Exam(name, axis.judge, data.held_out[name]) for name, axis in config.axes.items() if axis.judge]
    sets = config.evaluation.sets
    return [*axes, *(Exam(name, s.judge, data.splits.sets[name].rows) for name, s in sets.items())]


@dataclass(frozen=True)
class Examination:
    """Everything that all systems share: the rows, the settings, and where the results go."""

    config: RunConfig
    base: BaseModel
    data: EncodedData
    out: Outputs

    def answers(self, exam: Exam, system: System) -> transcripts.Answers:
        circumstances = {
            "seed": self.config.seed,
            "model": manifest.fingerprint(system.identity),
            "max_new_tokens": self.config.evaluation.max_new_tokens,
        }
        return transcripts.Answers(self.out.answers / f"{system.name}.{exam.name}.jsonl", exam.rows, circumstances)

    def answer(self, systems: list[System]) -> None:
        """Every system's answers and likelihoods. Raises Stopped. Collective."""
        answered = sum(exam.is_answered for exam in exams(self.config, self.data))
        with console.progress("answers and likelihoods", len(systems) * (answered + 1)) as bar:
            for system in systems:
                signals.stop_if_requested("evaluation")
                self.sit(system, bar)

    def results(self, systems: list[System]) -> dict[str, Result]:
        """What the judges make of the answers, by system. On one rank alone."""
        names = sorted({exam.judge for exam in exams(self.config, self.data) if exam.is_answered})
        judges: dict[str, Judge] = {name: registry.make(name, self.config.judges) for name in names}
        return {system.name: self.judged(system, judges) for system in systems}

    def sit(self, system: System, progress: Progress) -> None:
        """Write the system's answers and likelihoods; what is there already is not made again. Collective."""
        model: PreTrainedModel | None = None
        settings = self.config.evaluation
        for exam in (e for e in exams(self.config, self.data) if e.is_answered):
            kept = self.answers(exam, system)
            if not distributed.on_main(kept.is_whole):
                model = model or system.build()
                prompts = [row.prompt for row in exam.rows]
                limit = settings.max_new_tokens
                answers(
                    model,
                    self.base.tokenizer,
                    prompts,
                    batch=settings.batch,
                    max_new_tokens=limit,
                    compiled=settings.compile,
                    keep=kept,
                )
            progress.advance()
        inputs = self._likelihood_inputs(system)
        if not distributed.on_main(lambda: self._measured(system, inputs)):
            found = self._measure(model or system.build())
            if distributed.is_main():
                text = json.dumps({"inputs": inputs, **found}, indent=2)
                manifest.write_text(self.out.likelihoods / f"{system.name}.json", text + "\n")
        progress.advance()

    def _likelihood_inputs(self, system: System) -> dict[str, Any]:
        measured = [e for e in exams(self.config, self.data) if not e.is_answered]
        return {
            "model": manifest.fingerprint(system.identity),
            "references": manifest.fingerprint({"ids": [e.ids for e in self.data.references.examples]}),
            "sets": {e.name: [e.judge, digest(e.rows)] for e in measured},
        }

    def _measured(self, system: System, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The kept likelihoods, when they were made from just these inputs."""
        path = self.out.likelihoods / f"{system.name}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content if content.get("inputs") == inputs else None

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        config, tokenizer = self.config, self.base.tokenizer
        batch, pad_id = config.evaluation.batch, pad_token(tokenizer)
        found = likelihoods(model, self.data.references.examples, pad_id, batch)
        by_axis: dict[str, list[Likelihood]] = {axis: [] for axis in config.axes}
        for expert, likelihood in zip(self.data.references.experts, found, strict=True):
            if config.expert_names[expert] in by_axis:
                by_axis[config.expert_names[expert]].append(likelihood)
        sets = {
            e.name: MEASURES[e.judge](model, tokenizer, e.rows, batch)
            for e in exams(config, self.data)
            if not e.is_answered
        }
        return {"perplexity": {a: perplexity(f) for a, f in by_axis.items() if f}, "figures": sets}

    def judged(self, system: System, judges: dict[str, Judge]) -> Result:
        """The figures of a system that has sat. On one rank alone: a judge may take hours, and nobody waits for it."""
        measured = self._measured(system, self._likelihood_inputs(system))
        assert measured is not None, "judged before it has sat"
        figures: dict[str, Figures] = {}
        samples = {}
        for exam in exams(self.config, self.data):
            if not exam.is_answered:
                figures[exam.name] = measured["figures"][exam.name]
                continue
            outputs, judge = self.answers(exam, system).kept(), judges[exam.judge]
            path = self.out.verdicts / f"{system.name}.{exam.name}.{exam.judge}.jsonl"
            figures[exam.name] = judge.figures(exam.rows, transcripts.verdicts(path, judge, exam.rows, outputs))
            samples[exam.name] = list(zip(exam.rows, outputs, strict=True))[:3]
        return Result(figures, measured["perplexity"], samples)
