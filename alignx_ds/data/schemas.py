"""The published row schemas: which columns each needs, and how its records become rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from types import NoneType

from alignx_ds.data import dialogues, parsers
from alignx_ds.data.columns import Column, Records, canonical_records
from alignx_ds.data.files import PlacedRecord
from alignx_ds.data.rows import Record, Row


@dataclass(frozen=True)
class Schema:
    """`parse` makes training rows, `parse_held_out` (default: the same) held-out rows.

    `question` gives the prompt of the row that a record becomes: sources are split by it, before they are parsed.
    """

    columns: dict[str, Column]
    question: Callable[[Record], str]
    parse: Callable[[list[PlacedRecord]], parsers.Parsed]
    parse_held_out: Callable[[list[PlacedRecord]], parsers.Parsed] | None = None
    parse_texts: Callable[[list[PlacedRecord]], list[Row]] | None = None
    has_bad_answers: bool = False  # beside the good ones: what objectives other than sft and poft need

    def texts(self, records: list[PlacedRecord]) -> list[Row]:
        """All prompts with all their answers, wrong and harmful ones too, to train a base model from scratch on."""
        return self.parse_texts(records) if self.parse_texts else self.parse(records).rows

    def held_out(self, records: list[PlacedRecord]) -> parsers.Parsed:
        return (self.parse_held_out or self.parse)(records)


def _question(prompt: str, response: str = "", category: str = "", *, harmful: bool = False) -> Schema:
    """A schema of questions for evaluation. The arguments name the columns of prompt, reference answer and category."""

    def make(place: str, r: Record) -> Row | str:
        if not r[prompt].strip():
            return f"empty {prompt}"
        reference, group = ((r[column] or "").strip() if column else "" for column in (response, category))
        unsafe = harmful or (category == "label" and group == "unsafe")
        return Row(r[prompt].strip(), reference, unsafe, category=group, place=place)

    columns = {column: TEXT for column in (prompt, response, category) if column}
    if harmful:
        columns[category] = OPTIONAL_TEXT
    return Schema(columns, itemgetter(prompt), parsers.each_record(make))


def _dialogues(
    columns: dict[str, Column], parse: Callable[[str, Record], Row | str], *, has_bad_answers: bool = False
) -> Schema:
    read = parsers.each_record(parse)
    return Schema(columns, dialogues.question_of(parse), read, has_bad_answers=has_bad_answers)


TURNS = (list, dict)  # `datasets` has lists of objects as a mapping of lists
TEXT, OPTIONAL_TEXT = Column((str,)), Column((str,), optional=True)
FLAGS = Column((dict,), values=(bool, NoneType))  # in a Parquet row, an absent flag is None
TRUTHFULQA = {
    "Question": Column((str,), ("question",)),
    "Best Answer": Column((str,), ("best_answer",)),
    "Correct Answers": Column((str, list), ("correct_answers",)),
    "Incorrect Answers": Column((str, list), ("incorrect_answers",)),
}
BEAVERTAILS = {"prompt": TEXT, "response": TEXT, "category": FLAGS, "is_safe": Column((bool,))}
CHOICES = {"question": TEXT, "mc1_targets": Column((dict,)), "mc2_targets": Column((dict,))}
SCHEMAS: dict[str, Schema] = {
    "alpaca": Schema(
        {
            "instruction": TEXT,
            "input": OPTIONAL_TEXT,
            "output": TEXT,
            "system": OPTIONAL_TEXT,
            "history": Column((list,), items=list, optional=True),
        },
        parsers.alpaca_question,
        parsers.each_record(parsers.alpaca),
    ),
    "messages": _dialogues(
        {"messages": Column(TURNS, ("conversation", "conversations"), items=dict), "system": OPTIONAL_TEXT},
        dialogues.messages,
    ),
    "labelled": _dialogues(
        {
            "messages": Column(TURNS, ("conversation", "conversations"), items=dict),
            "needs": Column((list,)),
            "category": OPTIONAL_TEXT,
            "harmful": Column((bool,), optional=True),
        },
        dialogues.labelled,
    ),
    "sharegpt": _dialogues(
        {"conversations": Column(TURNS, ("conversation", "messages"), items=dict), "system": OPTIONAL_TEXT},
        dialogues.sharegpt,
    ),
    "dpo": _dialogues(
        {
            "prompt": Column(
                (str, *TURNS), ("question", "instruction", "conversations", "messages"), items=dict, optional=True
            ),
            "chosen": Column((str, *TURNS), items=dict),
            "rejected": Column((str, *TURNS), items=dict, optional=True),
            "system": OPTIONAL_TEXT,
        },
        dialogues.pair,
        has_bad_answers=True,
    ),
    "hh_rlhf": _dialogues({"chosen": TEXT, "rejected": TEXT}, dialogues.hh_rlhf, has_bad_answers=True),
    "beavertails": Schema(
        BEAVERTAILS,
        itemgetter("prompt"),
        parsers.beavertails,
        parsers.beavertails_held_out,
        parsers.beavertails_texts,
        has_bad_answers=True,
    ),
    "truthfulqa": Schema(
        TRUTHFULQA,
        itemgetter("Question"),
        parsers.each_record(parsers.truthfulqa),
        parse_texts=parsers.truthfulqa_texts,
        has_bad_answers=True,
    ),
    "xstest_answers": Schema(
        {"prompt": TEXT, "type": TEXT, "completion": TEXT},
        itemgetter("prompt"),
        parsers.each_record(parsers.xstest_answers),
    ),
    "plain": Schema({"prompt": TEXT, "response": TEXT}, itemgetter("prompt"), parsers.each_record(parsers.plain)),
    "truthfulqa_mc": Schema(CHOICES, itemgetter("question"), parsers.each_record(parsers.truthfulqa_choices)),
    "preference": Schema(
        {"instruction": TEXT, "input": OPTIONAL_TEXT, "output": Column((list,))},
        parsers.instruction_with_input,
        parsers.each_record(parsers.preference),
        has_bad_answers=True,
    ),
    "alpaca_eval": _question("instruction", "output", "dataset"),
    "honeset": _question("instruction", category="category"),
    "xstest": _question("prompt", category="label"),
    "prompts": _question("prompt", category="category", harmful=True),  # BeaverTails-Evaluation
}
LABELS_HARM = frozenset({"beavertails", "xstest", "xstest_answers"})  # their rows say whether a prompt asks for harm
QUESTIONS_ONLY = frozenset({"truthfulqa_mc", "alpaca_eval", "honeset", "xstest", "prompts"})  # nothing to train on


def canonical(placed: Iterable[PlacedRecord], schema: str, renamed: dict[str, str]) -> Records:
    """The records under the schema's column names; `renamed` maps them to the file's. Raises DataError."""
    return canonical_records(placed, schema, SCHEMAS[schema].columns, renamed)


def schema_problem(schema: str, columns: dict[str, str]) -> str:
    """What is wrong with a mapping of column names, or nothing."""
    unknown = [name for name in columns if name not in SCHEMAS[schema].columns]
    known = ", ".join(SCHEMAS[schema].columns)
    return f"the {schema} schema has no column {', '.join(unknown)}; it has {known}" if unknown else ""
