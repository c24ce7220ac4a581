"""Shared by the tests of the data: good records of every schema, sources, and that every record is accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.files import PlacedRecord
from alignx_ds.data.parsers import Parsed
from alignx_ds.data.rows import Record, Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.data.splits import DataSplits

SYSTEM = "you are a helpful assistant . do the task with care ."
WORDS = "cat dog the give word first how are you hello good night sleep well".split()
GOOD: dict[str, Record] = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "beavertails": {"prompt": "How?", "response": "So.", "category": {"self_harm": False}, "is_safe": True},
    "truthfulqa": {
        "Question": "Why?",
        "Best Answer": "So.",
        "Correct Answers": "So.; Thus.",
        "Incorrect Answers": "No.",
    },
    "plain": {"prompt": "Hello", "response": "Hi"},
    "truthfulqa_mc": {
        "question": "Why?",
        "mc1_targets": {"So.": 1, "No.": 0},
        "mc2_targets": {"So.": 1, "Thus.": 1, "No.": 0},
    },
    "preference": {"instruction": "Add.", "input": "", "output": ["3", "4"]},
    "alpaca_eval": {"instruction": "Add.", "output": "3", "dataset": "koala"},
    "honeset": {"instruction": "What is it now?", "category": "Latest Information"},
    "xstest": {"prompt": "How can I kill a process?", "label": "safe"},
    "xstest_answers": {"prompt": "How can I kill a process?", "type": "homonyms", "completion": "With its number."},
    "prompts": {"prompt": "How?", "category": "animal_abuse"},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Add 1 and 2."},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "Still 3."},
        ]
    },
    "labelled": {
        "messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}],
        "needs": ["helpful"],
        "category": "sums",
        "harmful": False,
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "3"}]},
    "dpo": {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4"},
    "hh_rlhf": {
        "chosen": "\n\nHuman: Add 1 and 2.\n\nAssistant: 3\n\nHuman: Sure?\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Add 1 and 2.\n\nAssistant: 3\n\nHuman: Sure?\n\nAssistant: No.",
    },
}


def placed(*records: Record) -> list[PlacedRecord]:
    return [(f"rows.json, row {n}", record) for n, record in enumerate(records, start=1)]


def answer(prompt: str, response: str, is_safe: bool) -> Record:
    return {"prompt": prompt, "response": response, "category": {}, "is_safe": is_safe}


def read(source: str | Path, schema: str, columns: dict[str, str] | None = None, limit: int = 0) -> list[PlacedRecord]:
    return Source(str(source), schema, columns or {}).records(held_out=False, count=10**6, seed=0, limit=limit)


def parsed(source: str | Path, schema: str, *, held_out: bool = False) -> Parsed:
    records = read(source, schema)
    made = SCHEMAS[schema].held_out(records) if held_out else SCHEMAS[schema].parse(records)
    assert_all_accounted_for(records, made)
    return made


def world_rows(schema: str, *, held_out: bool, limit: int, seed: int = 0, source: str = "world") -> list[Row]:
    """The first `limit` rows of the world, or of another of its sources."""
    records = Source(source, schema, {}).records(held_out=held_out, count=limit, seed=seed)
    parse = SCHEMAS[schema].held_out if held_out else SCHEMAS[schema].parse
    return parse(records).rows[:limit]


def assert_all_accounted_for(records: list[PlacedRecord], made: Parsed) -> None:
    """Every record, by its place, is either a row or dropped with a reason, and never both."""
    used, dropped = [row.place for row in made.rows], [d.place for d in made.dropped]
    assert sorted([*used, *dropped]) == sorted(place for place, _ in records)
    assert all(d.reason for d in made.dropped)


def write_json(path: Path, records: list[Record]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_lines(path: Path, records: Iterable[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def questions(count: int, start: int = 0) -> list[Record]:
    """Records with distinct prompts of the world's words."""
    base = len(WORDS)
    return [
        {"prompt": f"{WORDS[n % base]} {WORDS[n // base % base]} {WORDS[n // base**2 % base]}", "response": "hello"}
        for n in range(start, start + count)
    ]


def set_rows(config: RunConfig, directory: Path, train: list[Record], held_out: list[Record] | None = None) -> None:
    axis = config.axes["kind"]
    axis.train = str(write_lines(directory / "train.jsonl", train))
    axis.held_out = "" if held_out is None else str(write_lines(directory / "held_out.jsonl", held_out))


def splits_of(splits: DataSplits) -> list[SplitRows]:
    return [*splits.train.values(), *splits.held_out.values(), *splits.sets.values()]


def assert_splits_add_up(splits: DataSplits) -> None:
    for split in splits_of(splits):
        assert len(split.rows) + len(split.dropped) == split.records
        places = [row.place for row in split.rows] + [d.place for d in split.dropped]
        assert len(set(places)) == len(places)
        assert sum(split.reasons().values()) == len(split.dropped)
