"""`alignx-ds answer --best-of N --scorer NAME[=WEIGHT],…`: what its options mean, and the files that it writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.best_of import Drawing, Weights, best, needs_by_gate, rewards
from alignx_ds.evaluation.judge_settings import judges_config
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Judge
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runs import manifest

SCORER = "--scorer"
HOTTEST = 2.0  # temperature, as in OpenAI's API


@dataclass(frozen=True)
class BestOf:
    """Of which answers which judges choose.

    Weights are numbers, or axes of an aligned model: then they are its gate's probabilities for the prompt.
    """

    drawing: Drawing
    judges: Mapping[str, Judge]
    weights: Mapping[str, float | str]

    @classmethod
    def of_options(
        cls, n: int | None, scorers: str | None, temperature: float | None, seed: int | None, settings: Sequence[str]
    ) -> BestOf | None:
        """None where no option is given. Raises ConfigError with every problem, also those of a judge's settings."""
        if n is None and scorers is None:
            given = {"--temperature": temperature, "--seed": seed, "KEY=VALUE": " ".join(settings) or None}
            fix = "give --best-of N and --scorer NAME too, or leave it out"
            if wrong := [Problem(key, value, "nothing", fix) for key, value in given.items() if value is not None]:
                raise ConfigError(*wrong)
            return None
        drawing = Drawing(n or 0, 1.0 if temperature is None else temperature, seed or 0)
        parts = [part.strip().partition("=")[::2] for part in (scorers or "").split(",")]
        if wrong := [*_wrong_numbers(n, drawing), *_wrong_scorers(parts)]:
            raise ConfigError(*wrong)
        config = judges_config(list(settings))
        judges = {name: registry.make(name, config) for name, _ in parts}
        return cls(drawing, judges, {name: _weight(weight) for name, weight in parts})

    @property
    def identity(self) -> dict[str, Any]:
        return {name: [self.weights[name], manifest.fingerprint(judge.identity)] for name, judge in self.judges.items()}

    def by_row(self, needs: Sequence[Weights]) -> list[Weights]:
        """The weight of every judge, for prompts of which the axes have these probabilities."""
        return [
            {name: own[weight] if isinstance(weight, str) else weight for name, weight in self.weights.items()}
            for own in needs
        ]

    def check_axes(self, model: PreTrainedModel) -> None:
        """Raises ConfigError for an axis that the model does not have."""
        known = model.config.experts[1:] if isinstance(model, AlignXForCausalLM) else []
        fix = f"the model's axes are {', '.join(known)}" if known else "only an aligned model has axes; give a number"
        axes = [weight for weight in self.weights.values() if isinstance(weight, str) and weight not in known]
        if wrong := [Problem(SCORER, axis, "a number, or an axis of the model", fix) for axis in axes]:
            raise ConfigError(*wrong)

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        file: AnswerFile,
        *,
        batch: int,
        max_new_tokens: int,
    ) -> None:
        """The best answers to the rows of `file`; beside them all that were drawn, and the judges' verdicts on them.

        What is there already, of this model and by the same judges, is kept. Raises ConfigError.
        """
        self.check_axes(model)
        rows, n = list(file.rows), self.drawing.n
        aligned = isinstance(model, AlignXForCausalLM)
        needs: Sequence[Weights] = needs_by_gate(model, tokenizer, rows, batch) if aligned else [{}] * len(rows)
        every = AnswerFile(drawn(file.path), self.drawing.repeated(rows), file.provenance | self.drawing.provenance)
        said = self.drawing.draw(model, tokenizer, rows, batch=batch, max_new_tokens=max_new_tokens, file=every)
        rated = rewards(self.judges, rows, said, lambda name: file.path.with_suffix(f".drawn.{name}.jsonl"))
        chosen = [best(own, weights) for own, weights in zip(rated, self.by_row(needs), strict=True)]
        kept = AnswerFile(file.path, rows, every.provenance | {"scorers": self.identity})
        done = len(kept.load())
        kept.append(done, [said[i * n + number] for i, number in enumerate(chosen)][done:])


def drawn(out: Path) -> Path:
    """Where all answers are that are drawn for this file."""
    return out.with_suffix(".drawn.jsonl")


def _wrong_numbers(n: int | None, drawing: Drawing) -> Iterator[Problem]:
    if drawing.n < 1:
        yield Problem("--best-of", n, "at least 1", "give the number of answers to draw")
    if not 0 <= drawing.temperature <= HOTTEST:
        yield Problem("--temperature", drawing.temperature, f"between 0 and {HOTTEST:g}", "1 is the model itself")


def _wrong_scorers(parts: Sequence[tuple[str, str]]) -> Iterator[Problem]:
    names = [name for name, _ in parts]
    for name, given in parts:
        weight = _weight(given)
        if name not in registry.JUDGES:
            fix = "name one, or several with commas between them"
            yield Problem(SCORER, name or None, f"one of {', '.join(registry.JUDGES)}", fix)
        elif names.count(name) > 1:
            yield Problem(SCORER, name, "every scorer once", "leave the second one out")
        elif isinstance(weight, float) and not 0 < weight < math.inf:
            yield Problem(SCORER, f"{name}={given}", "a weight above 0", "leave the scorer out, or raise its weight")


def _weight(given: str) -> float | str:
    try:
        return float(given or 1)
    except ValueError:
        return given
