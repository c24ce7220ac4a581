"""From splits to token ids: the calibration split, rows that are too long, and what each use of the data gets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from reading import SYSTEM, answer, assert_splits_add_up, questions, set_rows, write_lines
from transformers import PreTrainedTokenizerBase

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import encode
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.inputs import CALIBRATION, EncodedData, encode_splits
from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import HELD_OUT
from alignx_ds.data.splits import read_sources
from alignx_ds.errors import DataError
from alignx_ds.plan.accounts import notes


def encoded(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> EncodedData:
    data = encode_splits(config, read_sources(config), Encodings(tokenizer))
    assert_splits_add_up(data.splits)
    return data


def test_the_calibration_split_is_independent_of_the_held_out_split(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """With the same salt, held-out rows would take all low hashes, and no row would be left for calibration."""
    assert HELD_OUT != CALIBRATION
    set_rows(one_axis, tmp_path, questions(800))
    one_axis.data.held_out_share = one_axis.data.calibration_share = 0.3
    data = encode_splits(one_axis, read_sources(one_axis), Encodings(world_tokenizer))
    train, calibration = len(data.train.examples), len(data.calibration_rows.examples)
    assert train + calibration == len(data.splits.train["kind"].rows)
    assert calibration / (train + calibration) == pytest.approx(0.3, abs=0.06)


def test_a_row_may_be_as_long_as_the_limit_and_no_longer(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    records = questions(40)
    records[7]["response"] = "hello " * 20
    set_rows(one_axis, tmp_path, records, questions(5, start=100))
    (longest,) = encode([Row(records[7]["prompt"], records[7]["response"].strip())], world_tokenizer, SYSTEM)
    one_axis.model.max_length = len(longest.ids)
    assert len(encoded(one_axis, world_tokenizer).injected["kind"]) == 40
    one_axis.model.max_length -= 1
    data = encoded(one_axis, world_tokenizer)
    (dropped,) = data.splits.train["kind"].dropped
    assert dropped.place.endswith("train.jsonl, row 8")
    assert dropped.reason == f"longer than model.max_length={one_axis.model.max_length} tokens"
    assert len(data.injected["kind"]) == 39
    assert all(len(e.ids) < len(longest.ids) for e in (*data.injected["kind"], *data.train.examples))


def test_rows_that_are_too_long_do_not_count_towards_the_limits(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of rows that are encoded at a time; and no more are encoded than are needed."""
    train, held_out = questions(40), questions(12, start=100)
    for record in (*train[:9:2], *held_out[:5]):
        record["response"] = "hello " * 60
    set_rows(one_axis, tmp_path, train, held_out)
    one_axis.model.max_length, one_axis.data.train_rows, one_axis.data.held_out_rows = 60, 10, 4
    for chunk in (1, 7, 1000):
        monkeypatch.setattr("alignx_ds.data.split_rows.CHUNK", chunk)
        splits = encoded(one_axis, world_tokenizer).splits
        assert [row.prompt for row in splits.train["kind"].rows] == [
            r["prompt"] for r in train if r["response"] == "hello"
        ][:10]
        assert [row.prompt for row in splits.held_out["kind"].rows] == [r["prompt"] for r in held_out[5:9]]
        assert splits.train["kind"].reasons() == {"longer than model.max_length=60 tokens": 5, "more than 10 rows": 25}


def test_a_row_that_is_longer_without_the_axis_prompt_is_left_out_too(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A template may write a default system prompt, and stage 2 gives none."""
    own = copy.deepcopy(world_tokenizer)
    assert isinstance(own.chat_template, str)
    own.chat_template = (
        "{% if messages[0].role != 'system' %}<system>" + "hello " * 60 + "{% endif %}" + own.chat_template
    )
    set_rows(one_axis, tmp_path, questions(40), questions(5, start=100))
    one_axis.model.max_length = 40
    with pytest.raises(DataError, match="all 40 rows are longer"):
        encoded(one_axis, own)


def test_rows_that_are_all_too_long_are_refused_with_their_source(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, questions(40), questions(5, start=100))
    one_axis.model.max_length = 3
    with pytest.raises(DataError, match=r"train\.jsonl \(kind\): all 40 rows are longer than model\.max_length=3"):
        encoded(one_axis, world_tokenizer)


def test_prompts_without_an_answer_are_routed_but_never_imitated(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    records = [answer(r["prompt"], "hello", n % 2 == 0) for n, r in enumerate(questions(60))]
    one_axis.axes["kind"].schema = "beavertails"
    set_rows(one_axis, tmp_path, records, [answer("good night", "bad", False)])
    data = encoded(one_axis, world_tokenizer)
    assert len(data.splits.train["kind"].rows) == 60
    assert len(data.injected["kind"]) == 30
    assert all(example.answer_length for example in data.injected["kind"])
    unanswered = [e for e in (*data.train.examples, *data.calibration_rows.examples) if not e.answer_length]
    assert len(unanswered) == 30
    assert data.references.examples == [] and len(data.routed.examples) == 1
    one_axis.axes["kind"].train = str(write_lines(tmp_path / "unsafe.jsonl", records[1::2]))
    with pytest.raises(DataError, match=r"unsafe\.jsonl \(kind\): no row has an answer to imitate"):
        encoded(one_axis, world_tokenizer)


def test_the_router_is_measured_on_prompts_alone(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, questions(40), questions(5, start=100))
    data = encoded(one_axis, world_tokenizer)
    assert [list(e.ids) for e in data.routed.examples] == [
        list(e.ids[: e.prompt_length]) for e in data.references.examples
    ]
    assert all(e.answer_length == 0 for e in data.routed.examples)
    assert data.routed.experts == data.references.experts == [1] * 5


def test_without_a_generalist_it_has_no_rows(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, questions(60))
    data = encoded(one_axis, world_tokenizer)
    assert {*data.train.experts, *data.calibration_rows.experts, *data.routed.experts} == {1}
    assert data.splits.train["generalist"].records == 0


def test_digests_depend_on_the_training_rows_alone(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, questions(40), questions(5, start=100))
    first = encoded(one_axis, world_tokenizer).digests
    set_rows(one_axis, tmp_path, questions(40), questions(6, start=100))
    assert encoded(one_axis, world_tokenizer).digests == first
    set_rows(one_axis, tmp_path, questions(41), questions(5, start=100))
    now = encoded(one_axis, world_tokenizer).digests
    assert now["injected kind"] != first["injected kind"]
    assert (now["train"], now["calibration_rows"]) != (first["train"], first["calibration_rows"])


def test_stage_1_is_evaluated_on_the_calibration_split_and_then_learns_none_of_it(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, questions(200), questions(5, start=300))
    whole = encoded(one_axis, world_tokenizer)
    assert len(whole.injected["kind"]) == 200 and whole.evaluated == {}
    one_axis.train.evaluate.every = 10
    data = encoded(one_axis, world_tokenizer)
    learned, evaluated = ({e.ids for e in part["kind"]} for part in (data.injected, data.evaluated))
    assert learned | evaluated == {e.ids for e in whole.injected["kind"]} and not learned & evaluated
    assert len(evaluated) == len(data.calibration_rows.examples), "the split that stage 2 has"
    assert f"  kind: stage 1 trains on no row of the calibration split, and is evaluated on {len(evaluated)} of it" in (
        notes(one_axis, data)
    )
    one_axis.train.evaluate.rows = 7
    assert encoded(one_axis, world_tokenizer).evaluated["kind"] == data.evaluated["kind"][:7]
    set_rows(one_axis, tmp_path, questions(200)[::-1], questions(5, start=300))
    assert encoded(one_axis, world_tokenizer).evaluated["kind"] == data.evaluated["kind"][:7], (
        "in any order of the file"
    )


def test_joined_rows_of_the_calibration_split_are_not_learned_either(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, questions(200), questions(5, start=300))
    one_axis.axes["kind"].join.share, one_axis.train.evaluate.every = 1.0, 10
    data = encoded(one_axis, world_tokenizer)
    assert data.joined["kind"].train and data.joined["kind"].calibration
    counted = len(data.splits.train["kind"].rows) + len(data.joined["kind"].rows)
    assert len(data.injected["kind"]) + len(data.evaluated["kind"]) == counted
    assert len(data.evaluated["kind"]) == len(data.calibration_rows.examples)


def test_pairs_of_the_calibration_split_are_evaluated_too(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    axis = one_axis.axes["kind"]
    axis.schema, axis.objective, one_axis.train.evaluate.every = "dpo", "dpo", 1
    rows = [{"prompt": r["prompt"], "chosen": "hello", "rejected": "hello hello"} for r in questions(60)]
    set_rows(one_axis, tmp_path, rows, [{"prompt": "who", "chosen": "hello", "rejected": "no"}])
    data = encoded(one_axis, world_tokenizer)
    pairs = data.compared["kind"], data.evaluated_compared["kind"]
    assert [len(part) for part in pairs] == [len(data.injected["kind"]), len(data.evaluated["kind"])]
    assert all(part.examples.others for part in pairs)
