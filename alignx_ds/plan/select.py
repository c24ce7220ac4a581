"""`alignx-ds data select`: which training rows to leave out, because others say the same or are better."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignx_ds.config import parse
from alignx_ds.config.schema import AxisConfig, RunConfig
from alignx_ds.config.sources import training_sources
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.inputs import too_long_rows
from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.selection import Choice, Encoder, by_question, choose, tf_idf
from alignx_ds.data.sources import Source
from alignx_ds.data.splits import limited, read_sources
from alignx_ds.data.world.rows import SOURCES
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.base import BaseModel
from alignx_ds.models.sentence_encoder import SentenceEncoder
from alignx_ds.plan import checks
from alignx_ds.runs.new_directory import new_directory
from alignx_ds.runtime import callables, console, distributed

ALL = 10**9  # rows: no limit
LEFT_OUT = "left-out.jsonl"
Scorer = Callable[[list[Row]], Sequence[float]]


@dataclass(frozen=True)
class Settings:
    """`axes`: those whose rows are chosen. `most`: questions kept of each (0: any number). `out`: where to write."""

    axes: list[str]
    similar: float
    most: int
    encoder: str
    scorers: list[str]
    out: Path | None
    shown: int


@dataclass(frozen=True)
class Selected:
    """The questions of an axis, each with its rows, its score and what became of it."""

    questions: list[list[Row]]
    scores: list[float]
    choices: list[Choice]

    def left_out(self) -> Iterator[tuple[list[Row], float, str]]:
        """(rows, score, reason) of each question that goes, those that are like another one first."""
        for rows, score, choice in zip(self.questions, self.scores, self.choices, strict=True):
            if choice.like is not None:
                other = self.questions[choice.like][0]
                yield rows, score, f"cosine {choice.cosine:.3f} with {other.place}: {_short(other.asked)}"
        for rows, score, choice in zip(self.questions, self.scores, self.choices, strict=True):
            if not choice.kept and choice.like is None:
                yield rows, score, "not among the best"


def select(recipe: str, overrides: Sequence[str], settings: Settings) -> None:
    """Prints what goes and why; with `out` writes the sources without it. Raises ConfigError and DataError."""
    config = parse.load(recipe, list(overrides))
    base = checks.check(config, distributed.planned_world_size(config.launch.ranks), weights=False)
    axes = settings.axes or list(config.axes)
    _check(config, axes, settings)
    encoder: Encoder = SentenceEncoder(settings.encoder, "--encoder") if settings.encoder else tf_idf
    scorers = [callables.load(name, "--scorer") for name in settings.scorers]
    found = {}
    for axis, rows in _candidates(config, axes, base).items():
        questions = list(by_question(rows).values())
        vectors = encoder([of_one[0].asked for of_one in questions])
        scores = [sum(of_one) / len(of_one) for of_one in _scores(questions, scorers, settings.scorers)]
        harmful = [any(row.harmful for row in of_one) for of_one in questions]
        choices = choose(vectors, scores, harmful, settings.similar, settings.most)
        found[axis] = Selected(questions, scores, choices)
    _show(found, settings)
    if settings.out:
        _write(config, found, settings.out)


def _check(config: RunConfig, axes: list[str], settings: Settings) -> None:
    for axis in axes:
        if axis not in config.axes:
            raise ConfigError(Problem("--axes", axis, f"some of {', '.join(config.axes)}", "name axes of the recipe"))
        generated = next((s.source for s in training_sources(config.axes[axis]) if s.source in SOURCES), None)
        if generated:
            fix = "its rows are generated; choose from files or data sets"
            raise ConfigError(Problem(f"axes.{axis}.train", generated, "rows that can be left out", fix))
    if not 0 < settings.similar <= 1:
        raise ConfigError(Problem("--similar", settings.similar, "above 0, at most 1", "1 leaves out equal ones alone"))
    if settings.most < 0:
        raise ConfigError(Problem("--most", settings.most, "0 or more", "0 keeps any number"))


def _candidates(config: RunConfig, axes: list[str], base: BaseModel) -> dict[str, list[Row]]:
    """By axis, all rows that a run without limits would train on: none is judged, near-duplicate of that, or too long.

    Every row is a candidate, or one that a limit keeps out now would take the place of one that goes, unseen.
    """

    def without_limits(axis: AxisConfig) -> AxisConfig:
        train = axis.train
        if isinstance(train, list):
            train = [{**entry, "weight": 0} for entry in train]
        return replace(axis, train=train, rows=0)

    every = {name: without_limits(axis) for name, axis in config.axes.items()}
    config = replace(config, axes=every, data=replace(config.data, train_rows=ALL))
    splits = limited(read_sources(config), config, too_long_rows(config, Encodings(base.tokenizer)))
    return {axis: splits.train[axis].rows for axis in axes}


def _scores(questions: list[list[Row]], scorers: list[Scorer], names: list[str]) -> list[list[float]]:
    """By question, its rows' scores: the product of what the scorers say of each (DEITA: complexity · quality)."""
    flat = [row for rows in questions for row in rows]
    product = [1.0] * len(flat)
    for scorer, name in zip(scorers, names, strict=True):
        given = [float(score) for score in scorer(flat)]
        if len(given) != len(flat) or not all(map(math.isfinite, given)):
            fix = f"it returned {len(given)} for {len(flat)} rows" if len(given) != len(flat) else "one is not finite"
            raise ConfigError(Problem("--scorer", name, "a finite number for each row", fix))
        product = [a * b for a, b in zip(product, given, strict=True)]
    scores = iter(product)
    return [[next(scores) for _ in rows] for rows in questions]


def _show(found: dict[str, Selected], settings: Settings) -> None:
    cells = []
    for axis, selected in found.items():
        alike = sum(choice.like is not None for choice in selected.choices)
        kept = sum(choice.kept for choice in selected.choices)
        rest = len(selected.choices) - kept - alike
        cells.append([axis, *(f"{n:,}" for n in (len(selected.choices), kept, alike, rest))])
    console.table("Questions to train on", ["axis", "all", "kept", "like another", "not among the best"], cells)
    for axis, selected in found.items():
        for number, (rows, score, reason) in enumerate(selected.left_out()):
            if number == settings.shown:
                break
            scored = f" (score {score:g})" if settings.scorers else ""
            console.say(f"{axis}: {rows[0].place}{scored}: {_short(rows[0].asked)}\n    {reason}")


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= 100 else one_line[:99] + "…"


def _write(config: RunConfig, found: dict[str, Selected], out: Path) -> None:
    """The sources without the questions that go, a file for each; and those questions, with the reasons."""
    lines = []
    with new_directory(out) as partial:
        with (partial / LEFT_OUT).open("w", encoding="utf-8") as file:
            for axis, selected in found.items():
                for rows, score, reason in selected.left_out():
                    places = [row.place for row in rows]
                    said = {"axis": axis, "question": rows[0].asked, "reason": reason, "score": score, "rows": places}
                    file.write(json.dumps(said, ensure_ascii=False) + "\n")
        for axis, selected in found.items():
            unwanted = {rows[0].question for rows, _, _ in selected.left_out()}
            lines += [f"  {axis}:", "    train:"]
            for number, given in enumerate(training_sources(config.axes[axis])):
                name = f"{axis}-{number}.jsonl"
                records = _records(config, given.source, given.schema, given.columns, unwanted)
                with (partial / name).open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                lines.append(f"      - {{source: {out / name}, schema: {given.schema}{_kept_settings(given)}}}")
    console.say(f"written: {out}; what goes, and why: {out / LEFT_OUT}\nIn the recipe:\naxes:\n" + "\n".join(lines))


def _kept_settings(given: Any) -> str:
    weight = f", weight: {given.weight:g}" if given.weight else ""
    return weight + (f", needs: [{', '.join(given.needs)}]" if given.needs else "")


def _records(
    config: RunConfig, path: str, schema: str, columns: dict[str, str], unwanted: set[str]
) -> Iterator[dict[str, Any]]:
    """Those of a source, under the schema's column names, whose question does not go; the held-out ones stay too."""
    read = Source(path, schema, columns).read(held_out=False, count=ALL, seed=config.seed, limit=config.data.records)
    for _, record in read.usable:
        if Row(SCHEMAS[schema].question(record), "").question not in unwanted:
            yield {name: value for name, value in record.items() if value is not None}
