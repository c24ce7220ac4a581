"""Pairs and verdicts of an axis's rows, and the objectives that its rows can't feed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from alignx_ds.config.schema import AxisConfig, ModelConfig, RunConfig
from alignx_ds.data.compared import LEAST, MOST, ComparedRows, compared_rows
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.errors import DataError
from alignx_ds.plan import rows as plan_rows

ROWS = [Row("ask a", "good a", incorrect=("bad a", "worse a")), Row("ask a", "fine a", incorrect=("bad a",))]
OTHERS = [Row("ask b", "", harmful=True, incorrect=("bad b",)), Row("ask c", "good c")]


def config(objective: str, schema: str = "beavertails", length: int = 90) -> RunConfig:
    axis = AxisConfig(prompt="p", schema=schema, train="world", held_out="world", objective=objective)
    return RunConfig(model=ModelConfig(path="world", max_length=length), axes={"a": axis})


def made(settings: RunConfig, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> ComparedRows:
    split = SplitRows("rows.json", len(rows), rows, [])
    return compared_rows(settings, {"a": split}, Encodings(tokenizer))["a"]


def test_a_row_is_a_pair_with_each_of_its_bad_answers(world_tokenizer: PreTrainedTokenizerBase) -> None:
    found = made(config("dpo"), [*ROWS, *OTHERS], world_tokenizer).examples
    assert len(found.examples) == len(found.others) == 3
    for good, bad in zip(found.examples, found.others, strict=True):
        assert good.ids[: good.prompt_length] == bad.ids[: bad.prompt_length]
    assert found.lengths == [len(a.ids) + len(b.ids) for a, b in zip(found.examples, found.others, strict=True)]


@pytest.mark.parametrize(("objective", "weight"), [("dpo", 0.5), ("orpo", 0.0), ("simpo", 1.0)])
def test_a_good_answer_without_a_bad_one_is_alone(
    objective: str, weight: float, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = config(objective)
    settings.axes["a"].sft_weight = weight
    found = made(settings, [*ROWS, *OTHERS], world_tokenizer)
    assert found.alone == [False, False, False, True]
    last, other = found.examples.examples[-1], found.examples.others[-1]
    assert other.ids == last.ids[: last.prompt_length + 1]
    assert [d.reason for d in found.dropped] == ["without a good answer"]


def test_a_row_that_makes_no_pair_is_counted(world_tokenizer: PreTrainedTokenizerBase) -> None:
    found = made(config("dpo"), [*ROWS, *OTHERS], world_tokenizer)
    assert not any(found.alone)
    assert [d.reason.split(";")[0] for d in found.dropped] == ["without a good answer", "without a bad answer"]


def test_an_answer_is_judged_once(world_tokenizer: PreTrainedTokenizerBase) -> None:
    """Also the bad answer to a prompt without a good one."""
    found = made(config("kto"), [*ROWS, *OTHERS], world_tokenizer)
    assert found.good == [True, False, False, True, False, True]
    assert len(found.mismatched) == len(found)
    weights = made(config("bco"), [*ROWS, *OTHERS], world_tokenizer).weights
    assert all(w == 1 if good else LEAST <= w <= MOST for w, good in zip(weights, found.good, strict=True))


def test_without_a_bad_answer_that_fits_there_is_nothing_to_compare(world_tokenizer: PreTrainedTokenizerBase) -> None:
    for objective in ("dpo", "kto"):
        with pytest.raises(DataError, match="bad"):
            made(config(objective), [Row("ask c", "good c")], world_tokenizer)


def test_an_objective_that_the_schema_can_t_feed_is_refused() -> None:
    keys = {
        objective: [p.key for p in plan_rows.problems(config(objective, "alpaca"))] for objective in ("dpo", "poft")
    }
    assert "axes.a.objective" in keys["dpo"] and "axes.a.objective" not in keys["poft"]
    mixed = config("dpo")
    mixed.axes["a"].train = [{"source": "a.json"}, {"source": "b.json", "schema": "alpaca"}]
    assert "axes.a.sft_weight" in [p.key for p in plan_rows.problems(mixed)]
    mixed.axes["a"].sft_weight = 0.1
    assert "axes.a.sft_weight" not in [p.key for p in plan_rows.problems(mixed)]
    joined = config("kto")
    joined.axes["a"].join.share = 0.5
    assert "axes.a.join.share" in [p.key for p in plan_rows.problems(joined)]


def test_the_digest_knows_which_answers_are_good(world_tokenizer: PreTrainedTokenizerBase) -> None:
    found = made(config("kto"), [*ROWS, *OTHERS], world_tokenizer)
    turned = replace(found, good=found.good[::-1])
    assert sum(turned.good) == sum(found.good) and turned.good != found.good
    assert turned.digest != found.digest
