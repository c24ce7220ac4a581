"""`alignx-ds data preview`: the rows as training reads them, their counts and lengths, and what is dropped and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, encode
from alignx_ds.data.inputs import RunInputs, read_inputs, taught_rows
from alignx_ds.data.rows import Row
from alignx_ds.plan import checks
from alignx_ds.plan.accounts import accounts, notes
from alignx_ds.plan.prompts import facts
from alignx_ds.runtime import console, distributed


@dataclass(frozen=True)
class Lengths:
    """Quantiles and sum of a list of lengths in tokens."""

    least: int
    median: int
    p95: int
    most: int
    total: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else [lengths[0]] * 19
        return cls(min(lengths), round(cuts[9]), round(cuts[18]), max(lengths), sum(lengths))

    def cells(self) -> list[str]:
        return [f"{n:,}" for n in (self.least, self.median, self.p95, self.most, self.total)]


def preview(recipe: str, overrides: Sequence[str], shown: int) -> None:
    """Print the rows of a recipe, the first `shown` of each axis as tokens. Raises ConfigError and DataError."""
    config = parse.load(recipe, list(overrides))
    base = checks.check(config, distributed.planned_world_size(config.launch.ranks), weights=False)
    _show(config, read_inputs(config, base), shown)


def _show(config: RunConfig, inputs: RunInputs, shown: int) -> None:
    tokenizer, data = inputs.base.tokenizer, inputs.data
    console.heading("Prompts and answers")
    for name, fact in facts(inputs.base).items():
        console.say(f"{name}: {fact}")
    console.heading("Rows")
    for line in (*accounts(data.splits, data.joined), *notes(config, data)):
        console.say(line)
    rows = []
    for axis, examples in data.injected.items():
        for part, lengths in _parts(examples).items():
            rows.append([f"{axis}, {part}", *Lengths.of(lengths).cells()])
    columns = ["tokens of the training rows", "min", "median", "95 %", "max", "total"]
    console.table("Lengths", columns, rows)
    for axis, settings in config.axes.items():
        kinds = {"training rows": [row for row in taught_rows(config, data.splits.train[axis]).rows if row.response]}
        if axis in data.joined:
            kinds["joined rows"] = data.joined[axis].rows
        for kind, rows_of in kinds.items():
            console.heading(f"{axis}: {kind}, as stage 1 reads them")
            examples = encode(rows_of[:shown], tokenizer, settings.prompt, every_answer=config.data.answers == "all")
            for row, example in zip(rows_of, examples, strict=False):
                _row(row, example, tokenizer)


def _parts(examples: list[Example]) -> dict[str, list[int]]:
    return {
        "prompt": [e.prompt_length for e in examples],
        "answer": [e.answer_length for e in examples],
        "row": [len(e.ids) for e in examples],
    }


def _row(row: Row, example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    spans = [*example.earlier, (example.prompt_length, len(example.ids))]
    pieces, last = [], 0
    for start, end in spans:
        pieces += [(example.ids[last:start], False), (example.ids[start:end], True)]
        last = end
    masked, learned = (tuple(i for ids, wanted in pieces if wanted is kind for i in ids) for kind in (False, True))
    console.say(f"\n{row.place}: {len(masked)} tokens masked, {len(learned)} learned")
    texts = [console.plain(tokenizer.decode(ids), "bold green" if wanted else "dim") for ids, wanted in pieces]
    console.say(Text.assemble(*texts))
    console.say(console.plain(f"masked {_ids(masked)}", "dim"))
    console.say(console.plain(f"learned {_ids(learned)}", "green"))


def _ids(ids: Sequence[int], limit: int = 24) -> str:
    return " ".join(map(str, ids[:limit])) + (f" … {len(ids) - limit} more" if len(ids) > limit else "")
