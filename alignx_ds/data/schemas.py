"""The published row schemas: which columns they need, and what becomes of a record.

A record becomes a row or is dropped with a reason; none disappears unsaid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from types import NoneType
from typing import Any

from alignx_ds.data.files import Placed
from alignx_ds.data.rows import Record, Row
from alignx_ds.errors import DataError

NO_INPUT = frozenset({"", "noinput", "<noinput>", "no input", "n/a"})  # how Alpaca writes that an input is absent
NO_OUTPUT = "<nooutput>"  # how the original Alpaca marks an answer that its writer could not give


@dataclass(frozen=True)
class Dropped:
    """A record, or a row, that is not used, and why."""

    place: str
    reason: str


@dataclass
class Parsed:
    rows: list[Row] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def drop(self, place: str, reason: str) -> None:
        self.dropped.append(Dropped(place, reason))


@dataclass(frozen=True)
class Column:
    """A column's types, the other names that published copies give it, and of a mapping the types of its values."""

    kinds: tuple[type, ...]
    aliases: tuple[str, ...] = ()
    values: tuple[type, ...] = (object,)


@dataclass(frozen=True)
class Schema:
    """`parse` makes the rows that are trained on, `parse_held_out` (default: the same) those that are judged.

    `question` is what a row will ask, known before it is parsed: splits go by it.
    """

    columns: dict[str, Column]
    question: Callable[[Record], str]
    parse: Callable[[list[Placed]], Parsed]
    parse_held_out: Callable[[list[Placed]], Parsed] | None = None
    parse_texts: Callable[[list[Placed]], list[Row]] | None = None

    def texts(self, records: list[Placed]) -> list[Row]:
        """Everything that the records say, right or wrong, as questions and answers: what a base model reads."""
        return self.parse_texts(records) if self.parse_texts else self.parse(records).rows

    def held_out(self, records: list[Placed]) -> Parsed:
        return (self.parse_held_out or self.parse)(records)


def _each(make: Callable[[str, Record], Row | str]) -> Callable[[list[Placed]], Parsed]:
    """A parser of independent records; `make` gives the row, or the reason why there is none."""

    def parse(records: list[Placed]) -> Parsed:
        parsed = Parsed()
        for place, record in records:
            made = make(place, record)
            if isinstance(made, Row):
                parsed.rows.append(made)
            else:
                parsed.drop(place, made)
        return parsed

    return parse


def _with_input(record: Record) -> str:
    extra = record["input"].strip()
    absent = extra.strip(" '\".").lower() in NO_INPUT
    return record["instruction"].strip() if absent else f"{record['instruction'].strip()}\n{extra}"


def _alpaca(place: str, r: Record) -> Row | str:
    output = r["output"].strip()
    if not r["instruction"].strip():
        return "empty instruction"
    if not output:
        return "empty output"
    if NO_OUTPUT in output.lower():
        return f"marked {NO_OUTPUT}"
    return Row(_with_input(r), output, place=place)


def _beavertails(records: list[Placed]) -> Parsed:
    """Only safe answers are imitated; a prompt without one is kept as a question that belongs to the axis."""
    parsed = Parsed()
    harmful = _harmful_prompts(records)
    imitated = {r["prompt"].strip() for _, r in records if r["is_safe"] and r["response"].strip()}
    asked: set[str] = set()
    for place, r in records:
        prompt, response = r["prompt"].strip(), r["response"].strip()
        if not prompt:
            parsed.drop(place, "empty prompt")
        elif r["is_safe"] and not response:
            parsed.drop(place, "empty response")
        elif r["is_safe"]:
            parsed.rows.append(Row(prompt, response, prompt in harmful, category=_categories(r), place=place))
        elif prompt in imitated or prompt in asked:
            parsed.drop(place, "unsafe answer, not imitated")
        else:
            asked.add(prompt)
            parsed.rows.append(Row(prompt, "", True, category=_categories(r), place=place))
    return parsed


def _beavertails_held_out(records: list[Placed]) -> Parsed:
    """One row a prompt, with a safe answer as reference; a prompt that some answer met with harm is harmful."""
    parsed = Parsed()
    harmful = _harmful_prompts(records)
    rows: dict[str, Row] = {}
    for place, r in records:
        prompt, response = r["prompt"].strip(), r["response"].strip() if r["is_safe"] else ""
        if not prompt:
            parsed.drop(place, "empty prompt")
            continue
        better = prompt not in rows or bool(response and not rows[prompt].response)
        if prompt in rows:
            parsed.drop(rows[prompt].place if better else place, "another answer to a question that is there")
        if better:
            rows[prompt] = Row(prompt, response, prompt in harmful, category=_categories(r), place=place)
    parsed.rows = list(rows.values())
    return parsed


def _beavertails_texts(records: list[Placed]) -> list[Row]:
    return [
        Row(r["prompt"].strip(), r["response"].strip(), place=place) for place, r in records if r["response"].strip()
    ]


def _harmful_prompts(records: list[Placed]) -> set[str]:
    return {r["prompt"].strip() for _, r in records if not r["is_safe"]}


def _categories(record: Record) -> str:
    return "; ".join(sorted(name for name, hit in record["category"].items() if hit))


def _truthfulqa(place: str, r: Record) -> Row | str:
    question, best = r["Question"].strip(), r["Best Answer"].strip()
    if not question or not best:
        return "empty question" if not question else "empty best answer"
    correct = tuple(dict.fromkeys((best, *_answers(r["Correct Answers"]))))
    return Row(question, best, correct=correct, incorrect=_answers(r["Incorrect Answers"]), place=place)


def _truthfulqa_texts(records: list[Placed]) -> list[Row]:
    rows = _each(_truthfulqa)(records).rows
    return [Row(r.prompt, answer, place=r.place) for r in rows for answer in (*r.correct, *r.incorrect)]


def _answers(given: str | list[str]) -> tuple[str, ...]:
    parts = given.split(";") if isinstance(given, str) else given
    return tuple(part.strip() for part in parts if part.strip())


def _truthfulqa_choices(place: str, r: Record) -> Row | str:
    """MC1's one right answer is the response; MC2's sets are the correct and the incorrect answers."""
    one, several = _choices(place, r, "mc1_targets"), _choices(place, r, "mc2_targets")
    best = [text for text, right in one.items() if right]
    if len(best) != 1:
        raise DataError(f"{place}: column 'mc1_targets' has {len(best)} right answers; it needs exactly one")
    if not r["question"].strip() or not best[0]:
        return "empty best answer" if r["question"].strip() else "empty question"
    correct, incorrect = (tuple(text for text, right in several.items() if right == wanted) for wanted in (True, False))
    return Row(r["question"].strip(), best[0], correct=correct, incorrect=incorrect, place=place)


def _choices(place: str, record: Record, column: str) -> dict[str, bool]:
    """{answer: label}, or the hub's {choices: [...], labels: [...]}. An answer that stands there twice counts once."""
    given: dict[str, Any] = record[column]
    pairs = list(given.items())
    if set(given) == {"choices", "labels"}:
        texts, labels = given["choices"], given["labels"]
        if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
            raise DataError(f"{place}: column '{column}' needs two lists of one length, choices and labels")
        _checked_text(place, column, texts)
        pairs = list(zip(texts, labels, strict=True))
    if not all(label in (0, 1) for _, label in pairs):
        raise DataError(f"{place}: column '{column}' has a label other than 0 and 1; correct it")
    labelled: dict[str, bool] = {}
    for text, label in pairs:
        if labelled.setdefault(text.strip(), bool(label)) != bool(label):
            raise DataError(f"{place}: column '{column}' has '{text.strip()}' as right and as wrong; correct it")
    return labelled


def _preference(place: str, r: Record) -> Row | str:
    pair = r["output"]
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise DataError(f"{place}: column 'output' needs two texts, the chosen and the rejected answer")
    chosen, rejected = (text.strip() for text in pair)
    if not r["instruction"].strip():
        return "empty instruction"
    return Row(_with_input(r), chosen, rejected=rejected, place=place) if chosen and rejected else "empty answer"


def _question(prompt: str, response: str = "", category: str = "", *, harmful: bool = False) -> Schema:
    """A schema of questions whose answers, if any, are references. Arguments name the columns."""

    def make(place: str, r: Record) -> Row | str:
        if not r[prompt].strip():
            return f"empty {prompt}"
        reference, group = (r[column].strip() if column else "" for column in (response, category))
        unsafe = harmful or (category == "label" and group == "unsafe")
        return Row(r[prompt].strip(), reference, unsafe, category=group, place=place)

    columns = {column: TEXT for column in (prompt, response, category) if column}
    return Schema(columns, itemgetter(prompt), _each(make))


def _plain(place: str, r: Record) -> Row | str:
    prompt, response = r["prompt"].strip(), r["response"].strip()
    if not prompt or not response:
        return "empty prompt" if not prompt else "empty response"
    return Row(prompt, response, place=place)


TEXT = Column((str,))
FLAGS = Column((dict,), values=(bool, NoneType))  # Parquet has a value for every flag in every row: none, where absent
TRUTHFULQA = {
    "Question": Column((str,), ("question",)),
    "Best Answer": Column((str,), ("best_answer",)),
    "Correct Answers": Column((str, list), ("correct_answers",)),
    "Incorrect Answers": Column((str, list), ("incorrect_answers",)),
}
BEAVERTAILS = {"prompt": TEXT, "response": TEXT, "category": FLAGS, "is_safe": Column((bool,))}
CHOICES = {"question": TEXT, "mc1_targets": Column((dict,)), "mc2_targets": Column((dict,))}
SCHEMAS: dict[str, Schema] = {
    "alpaca": Schema({"instruction": TEXT, "input": TEXT, "output": TEXT}, _with_input, _each(_alpaca)),
    "beavertails": Schema(BEAVERTAILS, itemgetter("prompt"), _beavertails, _beavertails_held_out, _beavertails_texts),
    "truthfulqa": Schema(TRUTHFULQA, itemgetter("Question"), _each(_truthfulqa), parse_texts=_truthfulqa_texts),
    "plain": Schema({"prompt": TEXT, "response": TEXT}, itemgetter("prompt"), _each(_plain)),
    "truthfulqa_mc": Schema(CHOICES, itemgetter("question"), _each(_truthfulqa_choices)),
    "preference": Schema(
        {"instruction": TEXT, "input": TEXT, "output": Column((list,))}, _with_input, _each(_preference)
    ),
    "alpaca_eval": _question("instruction", "output", "dataset"),
    "honeset": _question("instruction", category="category"),
    "xstest": _question("prompt", category="label"),
    "prompts": _question("prompt", category="category", harmful=True),  # BeaverTails-Evaluation
}
QUESTIONS_ONLY = frozenset({"truthfulqa_mc", "alpaca_eval", "honeset", "xstest", "prompts"})  # sets to be judged on


def canonical(placed: Placed, schema: str, columns: dict[str, str]) -> Placed:
    """The record under the schema's own column names, every type checked. Raises DataError naming row and column.

    `columns` says which column of the file holds what the schema calls otherwise.
    """
    place, record = placed
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with columns, got {type(record).__name__}")
    made: Record = {}
    for name, column in SCHEMAS[schema].columns.items():
        source = columns[name] if name in columns else _found(record, name, column)
        if source not in record:
            present = ", ".join(map(str, record))
            raise DataError(f"{place}: no column '{source}', which the {schema} schema needs; it has {present}")
        value = record[source]
        if not isinstance(value, column.kinds):
            wanted = " or ".join(kind.__name__ for kind in column.kinds)
            found = "has no value" if value is None else f"is {type(value).__name__}"
            raise DataError(f"{place}: column '{source}' {found}, the {schema} schema needs {wanted}")
        for key, flag in value.items() if isinstance(value, dict) else ():
            if not isinstance(flag, column.values):
                what = f"column '{source}' has {type(flag).__name__} at '{key}'"
                raise DataError(f"{place}: {what}, the {schema} schema needs {column.values[0].__name__}")
        made[name] = _checked_text(place, source, value)
    return place, made


def _found(record: Record, name: str, column: Column) -> str:
    return next((alias for alias in column.aliases if name not in record and alias in record), name)


def _checked_text(place: str, column: str, value: Any) -> Any:
    for text in value if isinstance(value, (list, dict)) else [value]:
        if isinstance(value, list) and not isinstance(text, str):
            raise DataError(f"{place}: column '{column}' is a list with {type(text).__name__}; it needs texts")
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                what = f"column '{column}' is no valid Unicode at character {error.start}"
                raise DataError(f"{place}: {what}") from error
    return value
