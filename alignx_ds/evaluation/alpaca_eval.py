"""AlpacaEval's formulas and file formats, as published: win rates, reference outputs, annotations.

What is written here is read by the `alpaca_eval` package, which matches instructions to the letter.
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
    """In percent, over the `n` preferences that are known; `dropped` are not. Zeros where there is nothing to tell."""

    win_rate: float
    standard_error: float
    n: int
    dropped: int


@dataclass(frozen=True)
class Output:
    """What `generator` answered to an instruction; `dataset` is the part of AlpacaEval that it is from."""

    dataset: str
    instruction: str
    output: str
    generator: str


@dataclass(frozen=True)
class Annotation:
    """`preference`: 1 where output 1 (the baseline's) is better, 2 where output 2 (the model's) is, or in between.

    A draw is 0 in AlpacaEval 1's files and 1.5 in later ones. None is an annotator's reply that nobody could read.
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

    The standard error is 100 · s / √n, s the sample deviation (n − 1 in its denominator).
    """
    given = list(preferences)
    wins = [100.0 * ((p or DRAW) - 1.0) for p in given if p is not None]
    error = stdev(wins) / math.sqrt(len(wins)) if len(wins) > 1 else 0.0
    return WinRate(mean(wins) if wins else 0.0, error, len(wins), len(given) - len(wins))


def read_annotations(path: Path) -> list[Annotation]:
    """The annotations of a file; trimmed ones lack the outputs. Raises DataError naming file, row and column."""
    return [
        Annotation(
            instruction=_text(place, record, "instruction"),
            output_1=_text(place, record, "output_1", default=""),
            generator_1=_text(place, record, "generator_1"),
            output_2=_text(place, record, "output_2", default=""),
            generator_2=_text(place, record, "generator_2"),
            annotator=_text(place, record, "annotator"),
            preference=_preference(place, record),
        )
        for place, record in _records(path)
    ]


def read_reference(path: Path) -> dict[str, Output]:
    """Reference outputs by stripped instruction. A repeated instruction has one output, or it is a DataError.

    Rows come stripped, the published instructions do not all: `Output.instruction` keeps them as they are.
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
            fix = "keep the row that answers are compared with"
            raise DataError(f"{place}: column 'instruction' is an earlier row's, with another output; {fix}")
    if not references:
        raise DataError(f"{path}: no reference outputs in it; give a JSON list of instruction, output, generator")
    return references


def reference_of(row: Row, references: Mapping[str, Output]) -> Output:
    """By instruction, or the row's own. Raises DataError, naming the row, when there is none."""
    found = references.get(row.prompt.strip())
    if found is None and row.response:
        return Output(row.category, row.prompt, row.response, "reference")
    if found is None:
        where = row.place or "held-out row"
        fix = "add its output to judges.reference or remove the row"
        raise DataError(f"{where}: no reference output for the instruction {row.prompt[:80]!r}; {fix}")
    return found


def model_outputs(
    rows: Sequence[Row], answers: Sequence[str], references: Mapping[str, Output], generator: str
) -> list[Output]:
    """The model's answers under the published instructions, for the published annotator."""
    baselines = [reference_of(row, references) for row in rows]
    return [Output(b.dataset, b.instruction, a, generator) for b, a in zip(baselines, answers, strict=True)]


def annotated(
    baselines: Sequence[Output], outputs: Sequence[Output], preferences: Sequence[float | None], annotator: str
) -> list[Annotation]:
    """What `annotator` said of each baseline's output against the model's."""
    return [
        Annotation(b.instruction, b.output, b.generator, o.output, o.generator, annotator, p)
        for b, o, p in zip(baselines, outputs, preferences, strict=True)
    ]


def write(path: Path, records: Sequence[Output] | Sequence[Annotation]) -> None:
    """A file of model outputs or of annotations that `alpaca_eval` reads, whole or not at all."""
    manifest.write_text(path, json.dumps([asdict(record) for record in records], indent=2) + "\n")


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    for place, record in read_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {type(record).__name__}")
        yield place, record


def _text(place: str, record: Record, column: str, default: str | None = None) -> str:
    """As it is in the file. `default` stands for a column that may be missing."""
    if column not in record and default is None:
        raise DataError(f"{place}: no column '{column}'; it has {', '.join(record)}")
    value = record.get(column, default)
    if not isinstance(value, str):
        raise DataError(f"{place}: column '{column}' is {type(value).__name__}, expected str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: column '{column}' is no valid Unicode at character {error.start}") from error
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
