"""Best-of-n in a run: n answers of the base model and of the aligned one, from which the judges of the axes choose.

The judge that scores an axis is one of those that choose, so these rows are an upper baseline and no rival systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from alignx_ds.evaluation import transcripts
from alignx_ds.evaluation.best_of import Drawing, Weights, best, needs_by_gate, rewards
from alignx_ds.evaluation.evaluate import Evaluation, QuestionSet, System, question_sets
from alignx_ds.evaluation.judges.protocol import Metrics
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runtime import console, signals


@dataclass(frozen=True)
class BestOfRun:
    """First `draw`, then `choose`. The prompts are the held-out rows of the axes whose judge judges answers."""

    evaluation: Evaluation
    systems: Sequence[System]
    _weights: dict[tuple[str, str], list[Weights]] = field(default_factory=dict)  # by system and axis, of every row

    @property
    def drawing(self) -> Drawing:
        config = self.evaluation.config
        return Drawing(config.evaluation.best_of, seed=config.seed)

    @property
    def axes(self) -> list[QuestionSet]:
        config, data = self.evaluation.config, self.evaluation.data
        return [q for q in question_sets(config, data) if q.needs_answers and q.name in config.axes]

    def draw(self) -> None:
        """Draw what is not on disk yet, and weigh the judges: alike, or by an aligned model's gate. Collective."""
        settings, tokenizer = self.evaluation.config.evaluation, self.evaluation.base.tokenizer
        batch, limit = settings.batch, settings.max_new_tokens
        with console.progress("answers to choose from", len(self.systems) * len(self.axes)) as progress:
            for system in self.systems:
                model = system.load()
                for questions in self.axes:
                    signals.stop_if_requested("answers to choose from")
                    every, rows = self._drawn(questions, system), questions.rows
                    self.drawing.draw(model, tokenizer, rows, batch=batch, max_new_tokens=limit, file=every)
                    alike: Weights = {axis.name: 1.0 for axis in self.axes}
                    aligned = isinstance(model, AlignXForCausalLM)
                    needs = needs_by_gate(model, tokenizer, rows, batch) if aligned else [alike] * len(rows)
                    self._weights[system.name, questions.name] = needs
                    progress.advance()

    def choose(self) -> dict[str, dict[str, Metrics]]:
        """By name and axis: the metrics of the axis's judge. Runs on one rank; what is chosen and judged is kept."""
        return {self._named(s).name: {q.name: self._judged(q, s) for q in self.axes} for s in self.systems}

    def _judged(self, questions: QuestionSet, system: System) -> Metrics:
        n, rows, own = self.drawing.n, questions.rows, self.evaluation.judges[questions.judge]
        every, named = self._drawn(questions, system), self._named(system)
        said, verdicts = every.load(), self.evaluation.out.verdicts
        scorers = {axis.name: self.evaluation.judges[axis.judge] for axis in self.axes}
        rated = rewards(scorers, rows, said, lambda name: verdicts / f"{every.path.stem}.{name}.jsonl")
        weights = self._weights[system.name, questions.name]
        chosen = [said[i * n + best(one, w)] for i, (one, w) in enumerate(zip(rated, weights, strict=True))]
        file = self.evaluation.answer_file(questions, named)
        if file.load() != chosen:
            file.path.unlink(missing_ok=True)
            file.append(0, chosen)
        judged = verdicts / f"{named.name}.{questions.name}.{questions.judge}.jsonl"
        return own.metrics(rows, transcripts.verdicts(judged, own, rows, chosen))

    def _named(self, system: System) -> System:
        name = f"{system.name}+best-of-{self.drawing.n}"
        return replace(system, name=name, provenance=system.provenance | self.drawing.provenance)

    def _drawn(self, questions: QuestionSet, system: System) -> AnswerFile:
        """All answers, n to a row."""
        file = self.evaluation.answer_file(questions, self._named(system))
        return AnswerFile(file.path.with_suffix(".drawn.jsonl"), self.drawing.repeated(questions.rows), file.provenance)
