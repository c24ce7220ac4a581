"""Real prompts by source, of data sets for each axis, from ../shared/data or ALIGNX_DATA.

What a prompt needs is what its source was made to ask for: helpful answers, refusals or honesty. XSTest's safe prompts
only look harmful, and what they need is a helpful answer.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source

DATA = Path(os.environ.get("ALIGNX_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
AXES = ("helpful", "harmless", "honest")


@dataclass(frozen=True)
class PromptSource:
    """Where a source's prompts come from, and the axis that they need."""

    file: str
    schema: str
    axis: str
    label: str = ""  # only rows of this category


SOURCES = {
    "alpaca": PromptSource("alpaca/alpaca_cleaned_random2000.json", "alpaca", "helpful"),
    "beavertails": PromptSource("beavertails/beavertails_30k_test_first2021.jsonl", "beavertails", "harmless"),
    "truthfulqa": PromptSource("truthfulqa/TruthfulQA.csv", "truthfulqa", "honest"),
    "alpaca_eval": PromptSource(
        "alpaca_eval/text_davinci_003_reference_outputs_from_annotations.json", "alpaca_eval", "helpful"
    ),
    "beavertails_evaluation": PromptSource("beavertails/BeaverTails-Evaluation.json", "prompts", "harmless"),
    "xstest_safe": PromptSource("xstest/xstest_prompts.csv", "xstest", "helpful", "safe"),
    "xstest_unsafe": PromptSource("xstest/xstest_prompts.csv", "xstest", "harmless", "unsafe"),
    "honeset": PromptSource("honeset/HoneSet.json", "honeset", "honest"),
    "hh_rlhf": PromptSource("hh_rlhf/harmless_base_test_first500.jsonl", "hh_rlhf", "harmless"),
    "alpaca_cherry": PromptSource("alpaca/alpaca_original_cherry3111.json", "alpaca", "helpful"),
}


def first_question(row: Row) -> str:
    """The first thing that the user asks: of HH-RLHF's dialogues, later turns depend on what was answered."""
    return next((turn.text for turn in row.chat if turn.role == "user"), row.prompt)


def read_prompts(most: int, seed: int) -> dict[str, list[str]]:
    """By source at most `most` prompts, drawn by `seed`. No prompt is in two sources: the first one keeps it.

    Raises DataError where a file is missing.
    """
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name, source in SOURCES.items():
        schema = SCHEMAS[source.schema]
        records = Source(str(DATA / source.file), source.schema, {}).records(held_out=True, count=10**6, seed=0)
        rows = [row for row in schema.held_out(records).rows if not source.label or row.category == source.label]
        own: list[str] = []
        for prompt in map(first_question, rows):
            key = " ".join(prompt.casefold().split())
            if key not in seen:
                seen.add(key)
                own.append(prompt)
        random.Random(f"{seed} {name}").shuffle(own)
        found[name] = own[:most]
    return found
