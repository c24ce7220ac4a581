"""From records to rows: every one accounted for, held-out questions never learned, and too long rows left out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import answer, write_json, write_lines
from transformers import PreTrainedTokenizerBase

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig, SetConfig
from alignx_ds.data.encode import Example, encode
from alignx_ds.data.inputs import CALIBRATION, EncodedData, encode_splits
from alignx_ds.data.rows import Record, Row
from alignx_ds.data.splits import HELD_OUT, DataSplits, SplitRows, read_splits
from alignx_ds.errors import DataError
from alignx_ds.plan.dry_run import accounts

SYSTEM = "you are a helpful assistant . do the task with care ."
WORDS = "cat dog the give word first how are you hello good night sleep well".split()
RECORD = st.fixed_dictionaries({"prompt": st.sampled_from(["", " ", *"abcdef", "A", " b "]), "response": st.just("x")})


def asked(count: int, start: int = 0) -> list[Record]:
    """Different questions out of the world's words."""
    base = len(WORDS)
    return [
        {"prompt": f"{WORDS[n % base]} {WORDS[n // base % base]} {WORDS[n // base**2 % base]}", "response": "hello"}
        for n in range(start, start + count)
    ]


@pytest.fixture
def one_axis(tiny_config: RunConfig) -> RunConfig:
    """No generalist, and one axis whose rows are still to be set."""
    tiny_config.generalist = GeneralistConfig()
    tiny_config.axes = {"kind": AxisConfig(prompt=SYSTEM, schema="plain")}
    tiny_config.data.train_rows = tiny_config.data.held_out_rows = 10**6
    return tiny_config


def set_rows(config: RunConfig, directory: Path, train: list[Record], held_out: list[Record] | None = None) -> None:
    axis = config.axes["kind"]
    axis.train = str(write_lines(directory / "train.jsonl", train))
    axis.held_out = "" if held_out is None else str(write_lines(directory / "held_out.jsonl", held_out))


def sides(rows: DataSplits) -> list[SplitRows]:
    return [*rows.train.values(), *rows.held_out.values(), *rows.sets.values()]


def assert_accounted_for(rows: DataSplits) -> None:
    for side in sides(rows):
        assert len(side.rows) + len(side.dropped) == side.records
        places = [row.place for row in side.rows] + [d.place for d in side.dropped]
        assert len(set(places)) == len(places)
        assert sum(side.reasons().values()) == len(side.dropped)


def assert_nothing_held_out_is_learned(rows: DataSplits) -> None:
    judged = {row.question for side in rows.held_out.values() for row in side.rows}
    assert judged <= rows.judged_questions
    assert not rows.judged_questions & {row.question for side in rows.train.values() for row in side.rows}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.lists(RECORD, max_size=20),
    held_out=st.none() | st.lists(RECORD, max_size=8),
    limits=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 12)),
)
def test_used_and_dropped_are_all_there_are(
    one_axis: RunConfig,
    tmp_path: Path,
    train: list[Record],
    held_out: list[Record] | None,
    limits: tuple[int, int, int],
) -> None:
    """Whatever is empty, asked twice, held out or beyond a limit."""
    set_rows(one_axis, tmp_path, train, held_out)
    one_axis.data.held_out_share = 0.5
    one_axis.data.train_rows, one_axis.data.held_out_rows, one_axis.data.records = limits
    try:
        rows = read_splits(one_axis)
    except DataError:  # a side is left without rows
        return
    assert_accounted_for(rows)
    assert_nothing_held_out_is_learned(rows)
    read = one_axis.data.records or 10**6
    records = [min(len(part), read) for part in (train, held_out or [])]
    assert sum(side.records for side in sides(rows)) == sum(records)
    assert len(rows.train["kind"].rows) <= limits[0] and len(rows.held_out["kind"].rows) <= limits[1]


def test_a_source_is_split_by_question(one_axis: RunConfig, tmp_path: Path) -> None:
    """About its share is held out; the same question in another case or spacing is on the same side."""
    records = asked(800)
    again = [r | {"prompt": f" {r['prompt'].upper()}".replace(" ", "  ")} for r in records]
    set_rows(one_axis, tmp_path, [*records, *again])
    rows = read_splits(one_axis)
    assert_accounted_for(rows)
    assert_nothing_held_out_is_learned(rows)
    trained, judged = rows.train["kind"].rows, rows.held_out["kind"].rows
    assert len(trained) + len(judged) == 1600
    assert not {r.question for r in trained} & {r.question for r in judged}
    assert len(judged) / 1600 == pytest.approx(one_axis.data.held_out_share, abs=0.04)
    assert {r.position(HELD_OUT) < one_axis.data.held_out_share for r in judged} == {True}


def test_all_answers_to_a_question_are_on_one_side(one_axis: RunConfig, tmp_path: Path) -> None:
    records = [answer(r["prompt"], f"{safe}", safe) for r in asked(100) for safe in (True, False)]
    one_axis.axes["kind"].schema = "beavertails"
    set_rows(one_axis, tmp_path, records)
    rows = read_splits(one_axis)
    assert_accounted_for(rows)
    assert_nothing_held_out_is_learned(rows)
    assert {row.harmful for row in (*rows.train["kind"].rows, *rows.held_out["kind"].rows)} == {True}


def test_a_question_held_out_of_one_axis_is_trained_on_in_none(one_axis: RunConfig, tmp_path: Path) -> None:
    """Rows beyond the limit of those judged are not trained on either."""
    shared = asked(6)
    set_rows(one_axis, tmp_path, asked(40, start=100), shared)
    other = [r | {"prompt": r["prompt"].title()} for r in shared] + asked(40, start=300)
    path = str(write_json(tmp_path / "other.json", other))
    one_axis.axes["other"] = AxisConfig(prompt="", schema="plain", train=path)
    one_axis.generalist = GeneralistConfig(train=path)
    one_axis.data.held_out_rows = 3
    rows = read_splits(one_axis)
    assert_accounted_for(rows)
    assert_nothing_held_out_is_learned(rows)
    assert {Row(r["prompt"], "").question for r in shared} <= rows.judged_questions
    for name in ("other", "generalist"):
        lost = rows.train[name].reasons()["its question is held out"]
        elsewhere = sum(row.position(HELD_OUT) < 0.15 for row in (Row(r["prompt"], "") for r in shared))
        assert lost == 6 - elsewhere > 0


def test_calibration_is_cut_independently_of_what_is_held_out(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """With one salt for both, the training rows' low hashes would be gone, and nothing left to calibrate on."""
    assert HELD_OUT != CALIBRATION
    set_rows(one_axis, tmp_path, asked(800))
    one_axis.data.held_out_share = one_axis.data.calibration_share = 0.3
    data = encode_splits(one_axis, read_splits(one_axis), world_tokenizer)
    kept, back = len(data.train.examples), len(data.calibration_rows.examples)
    assert kept + back == len(data.splits.train["kind"].rows)
    assert back / (kept + back) == pytest.approx(0.3, abs=0.06)


def encoded(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> EncodedData:
    data = encode_splits(config, read_splits(config), tokenizer)
    assert_accounted_for(data.splits)
    return data


def test_a_row_may_just_fill_the_length_and_no_more(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    records = asked(40)
    records[7]["response"] = "hello " * 20
    set_rows(one_axis, tmp_path, records, asked(5, start=100))
    (longest,) = encode([Row(records[7]["prompt"], records[7]["response"].strip())], world_tokenizer, SYSTEM)
    one_axis.model.max_length = len(longest.ids)
    assert len(encoded(one_axis, world_tokenizer).injected["kind"]) == 40
    one_axis.model.max_length -= 1
    data = encoded(one_axis, world_tokenizer)
    (lost,) = data.splits.train["kind"].dropped
    assert lost.place.endswith("train.jsonl, row 8")
    assert lost.reason == f"longer than model.max_length={one_axis.model.max_length} tokens"
    assert len(data.injected["kind"]) == 39
    assert all(len(e.ids) < len(longest.ids) for e in (*data.injected["kind"], *data.train.examples))


def test_a_row_that_is_longer_without_the_axis_prompt_is_left_out_too(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A template may write a prompt of its own where it is given none; stage 2 gives none."""
    own = copy.deepcopy(world_tokenizer)
    assert isinstance(own.chat_template, str)
    own.chat_template = (
        "{% if messages[0].role != 'system' %}<system>" + "hello " * 60 + "{% endif %}" + own.chat_template
    )
    set_rows(one_axis, tmp_path, asked(40), asked(5, start=100))
    one_axis.model.max_length = 40
    with pytest.raises(DataError, match="all 40 rows are longer"):
        encoded(one_axis, own)


def test_rows_that_are_all_too_long_are_refused_with_their_source(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, asked(40), asked(5, start=100))
    one_axis.model.max_length = 3
    with pytest.raises(DataError, match=r"train\.jsonl: all 40 rows are longer than model\.max_length=3"):
        encoded(one_axis, world_tokenizer)


def test_questions_without_an_answer_are_routed_but_never_imitated(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    records = [answer(r["prompt"], "hello", n % 2 == 0) for n, r in enumerate(asked(60))]
    one_axis.axes["kind"].schema = "beavertails"
    set_rows(one_axis, tmp_path, records, [answer("good night", "bad", False)])
    data = encoded(one_axis, world_tokenizer)
    assert len(data.splits.train["kind"].rows) == 60
    assert len(data.injected["kind"]) == 30
    assert all(example.answer_length for example in data.injected["kind"])
    silent = [e for e in (*data.train.examples, *data.calibration_rows.examples) if not e.answer_length]
    assert len(silent) == 30
    assert data.references.examples == [] and len(data.routed.examples) == 1
    one_axis.axes["kind"].train = str(write_lines(tmp_path / "unsafe.jsonl", records[1::2]))
    with pytest.raises(DataError, match=r"unsafe\.jsonl \(kind\): no row has an answer to imitate"):
        encoded(one_axis, world_tokenizer)


def test_what_is_routed_is_the_prompt_alone(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, asked(40), asked(5, start=100))
    data = encoded(one_axis, world_tokenizer)
    prompts = [Example(e.ids[: e.prompt_length], e.prompt_length) for e in data.references.examples]
    assert data.routed.examples == prompts
    assert data.routed.experts == data.references.experts == [1] * 5


def test_without_a_generalist_no_row_is_the_bases_own(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, asked(60))
    data = encoded(one_axis, world_tokenizer)
    assert {*data.train.experts, *data.calibration_rows.experts, *data.routed.experts} == {1}
    assert data.splits.train["generalist"].records == 0


def test_extra_sets_are_accounted_for(one_axis: RunConfig, tmp_path: Path) -> None:
    set_rows(one_axis, tmp_path, asked(40))
    prompts = [{"prompt": p, "label": "safe"} for p in ("a", "", "b", "c")]
    source = str(write_json(tmp_path / "x.json", prompts))
    one_axis.evaluation.sets = {"x": SetConfig("xstest", source, "refusal", rows=2)}
    rows = read_splits(one_axis)
    assert_accounted_for(rows)
    assert [row.prompt for row in rows.sets["x"].rows] == ["a", "b"]
    assert rows.sets["x"].reasons() == {"empty prompt": 1, "more than 2 rows": 1}
    lines = "\n".join(accounts(rows))
    assert "set x" in lines and "2 of 4 records" in lines
    assert f"-1 empty prompt, e.g. {source}, row 2" in lines


@pytest.mark.parametrize(("train", "held_out", "what"), [(0, 3, "to train on"), (30, 0, "held out")])
def test_a_side_without_rows_is_refused_with_the_reasons(
    one_axis: RunConfig, tmp_path: Path, train: int, held_out: int, what: str
) -> None:
    empty = [{"prompt": "x", "response": ""}] * 2
    set_rows(one_axis, tmp_path, asked(train) or empty, asked(held_out, start=100) or empty)
    with pytest.raises(DataError, match=rf"\(kind\): no usable row {what} of 2 records \(2 × empty response\)"):
        read_splits(one_axis)
    set_rows(one_axis, tmp_path, asked(train), asked(held_out, start=100))
    with pytest.raises(DataError, match=rf"\(kind\): no usable row {what}: the source is empty"):
        read_splits(one_axis)


def test_digests_follow_the_training_rows(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    set_rows(one_axis, tmp_path, asked(40), asked(5, start=100))
    first = encoded(one_axis, world_tokenizer).digests
    set_rows(one_axis, tmp_path, asked(40), asked(6, start=100))
    assert encoded(one_axis, world_tokenizer).digests == first
    set_rows(one_axis, tmp_path, asked(41), asked(5, start=100))
    assert encoded(one_axis, world_tokenizer).digests["kind"] != first["kind"]
    assert json.dumps(first)


def test_a_side_forgets_nothing() -> None:
    side = SplitRows("s", 2, [Row("a", "b", place="1"), Row("c", "d", place="2")], [])
    assert side.without({}) == side
    shorter = side.without({0: "why not"})
    assert [row.place for row in shorter.rows] == ["2"] and shorter.reasons() == {"why not": 1}
    assert replace(shorter, rows=[], dropped=[]) == SplitRows("s", 2, [], [])


def test_a_set_loses_the_questions_that_an_axis_is_trained_on(one_axis: RunConfig, tmp_path: Path) -> None:
    """TruthfulQA's multiple choice asks the very questions that the honest axis learns."""
    set_rows(one_axis, tmp_path, asked(40))
    again = [{"prompt": r["prompt"].upper(), "label": "safe", "response": "x"} for r in asked(50)]
    one_axis.evaluation.sets = {"x": SetConfig("xstest", str(write_lines(tmp_path / "set.jsonl", again)), "refusal")}
    rows = read_splits(one_axis)
    trained = {row.question for row in rows.train["kind"].rows}
    kept = [row.question for row in rows.sets["x"].rows]
    assert trained and not trained & set(kept)
    assert len(kept) == 50 - len(trained)
    assert rows.sets["x"].reasons() == {"its question is trained on": len(trained)}
    assert set(kept) <= rows.judged_questions, "a base model from scratch does not read them either"
