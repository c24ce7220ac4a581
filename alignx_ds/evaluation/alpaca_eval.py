"""AlpacaEval's win rate and file formats, as published: model outputs, reference outputs, annotations.

The `alpaca_eval` package reads the files that are written here. It matches instructions character by character.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from alignx_ds.data.files import read_records
from alignx_ds.data.rows import Record, Row
from alignx_ds.errors import DataError
from alignx_ds.runs import manifest

DRAW = 1.5


@dataclass(frozen=True)
class WinRate:
    """In percent, over `n` preferences; `dropped` more are unknown. 0 if there is too little to compute it from."""

    win_rate: float
    standard_error: float
    n: int
    dropped: int


@dataclass(frozen=True)
class Output:
    """The output of the model `generator` for an instruction; `dataset` is a part of AlpacaEval."""

    dataset: str
    instruction: str
    output: str
    generator: str


@dataclass(frozen=True)
class Annotation:
    """`preference`: 1 where output 1 (the baseline's) is better, 2 where output 2 (the model's) is, or in between.

    A draw is 0 in AlpacaEval 1's files and 1.5 in later ones. None stands for a reply that could not be parsed.
    """

    instruction: str
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str
    annotator: str
    preference: float | None


def win_rate(preferences: Iterable[float | None]) -> WinRate:
    """100 · mean(preference − 1) with 0 read as a draw: AlpacaEval 1's formula, and AlpacaEval 2's (weighted).

    The standard error is 100 · s / √n, with the sample standard deviation s (n − 1 in its denominator).
    """
    every = list(preferences)
    wins = [100.0 * ((p or DRAW) - 1.0) for p in every if p is not None]
    error = stdev(wins) / math.sqrt(len(wins)) if len(wins) > 1 else 0.0
    return WinRate(mean(wins) if wins else 0.0, error, len(wins), len(every) - len(wins))


def read_annotations(path: Path) -> list[Annotation]:
    """The annotations of a file; the outputs may be missing. Raises DataError naming file, row and column."""
    return [_annotation(place, record, {"output_1": "", "output_2": ""}) for place, record in _records(path)]


def read_preferences(path: Path) -> list[Annotation]:
    """The annotations of a file with both outputs; the annotator's name may be missing. Raises DataError."""
    return [_annotation(place, record, {"annotator": ""}) for place, record in _records(path)]


def read_reference(path: Path) -> dict[str, Output]:
    """Reference outputs by stripped instruction, as rows have it; `Output.instruction` is not stripped.

    Raises DataError naming file, row and column, also if an instruction has two different outputs.
    """
    references: dict[str, Output] = {}
    for place, record in _records(path):
        output = Output(
            dataset=_text(place, record, "dataset", default=""),
            instruction=_text(place, record, "instruction"),
            output=_text(place, record, "output"),
            generator=_text(place, record, "generator"),
        )
        first = references.setdefault(output.instruction.strip(), output)
        if (first.output, first.generator) != (output.output, output.generator):
            fix = "keep one of the two rows"
            raise DataError(f"{place}: column 'instruction' repeats an earlier row's, with another output; {fix}")
    if not references:
        raise DataError(f"{path}: no reference outputs; give a JSON list with instruction, output and generator")
    return references


def reference_of(row: Row, references: Mapping[str, Output]) -> Output:
    """The reference output for the row's instruction, else the row's own response. Raises DataError naming the row."""
    found = references.get(row.prompt.strip())
    if found is None and row.response:
        return Output(row.category, row.asked, row.response, "reference")
    if found is None:
        where = row.place or "held-out row"
        fix = "add its output to judges.reference or remove the row"
        raise DataError(f"{where}: no reference output for the instruction {row.prompt[:80]!r}; {fix}")
    return found


def model_outputs(
    rows: Sequence[Row], answers: Sequence[str], references: Mapping[str, Output], generator: str
) -> list[Output]:
    """The model's answers with the instructions as published, for the published annotator."""
    baselines = [reference_of(row, references) for row in rows]
    return [Output(b.dataset, b.instruction, a, generator) for b, a in zip(baselines, answers, strict=True)]


def annotate(
    baselines: Sequence[Output], outputs: Sequence[Output], preferences: Sequence[float | None], annotator: str
) -> list[Annotation]:
    """The preferences of `annotator` between each baseline output and the model's."""
    return [
        Annotation(b.instruction, b.output, b.generator, o.output, o.generator, annotator, p)
        for b, o, p in zip(baselines, outputs, preferences, strict=True)
    ]


def write(path: Path, records: Sequence[Output] | Sequence[Annotation]) -> None:
    """Write a file of model outputs or of annotations, atomically."""
    manifest.write_text(path, json.dumps([asdict(record) for record in records], indent=2) + "\n")


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    for place, record in read_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {type(record).__name__}")
        yield place, record


def _annotation(place: str, record: Record, defaults: Mapping[str, str]) -> Annotation:
    """`defaults` has the texts of the columns that may be missing."""
    columns = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
    texts = {column: _text(place, record, column, defaults.get(column)) for column in columns}
    return Annotation(**texts, preference=_preference(place, record))


def _text(place: str, record: Record, column: str, default: str | None = None) -> str:
    """The column's text, unchanged. A column with a `default` may be missing."""
    if column not in record and default is None:
        raise DataError(f"{place}: no column '{column}'; it has {', '.join(record)}")
    value = record.get(column, default)
    if not isinstance(value, str):
        raise DataError(f"{place}: column '{column}' is {type(value).__name__}, expected str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: column '{column}' is not valid Unicode at character {error.start}") from error
    if column == "instruction" and not value.strip():
        raise DataError(f"{place}: column 'instruction' is empty; fill it in or remove the row")
    return value


def _preference(place: str, record: Record) -> float | None:
    if "preference" not in record:
        raise DataError(f"{place}: no column 'preference'; it has {', '.join(record)}")
    value = record["preference"]
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == 0 or 1 <= value <= 2):
        raise DataError(f"{place}: column 'preference' is {value!r}, expected 1 to 2, 0 for a draw, or null")
    return float(value)
