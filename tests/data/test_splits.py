"""Sources split into training and held-out rows: every record accounted for, held-out questions never trained on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import answer, assert_splits_add_up, questions, set_rows, splits_of, write_json, write_lines
from transformers import PreTrainedTokenizerBase

from alignx_ds.config.evaluation import SetConfig
from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.inputs import encode_splits
from alignx_ds.data.rows import Record, Row
from alignx_ds.data.split_rows import HELD_OUT, SplitRows
from alignx_ds.data.splits import DataSplits, read_sources, read_splits
from alignx_ds.errors import DataError
from alignx_ds.plan.accounts import accounts, notes

RECORD = st.fixed_dictionaries({"prompt": st.sampled_from(["", " ", *"abcdef", "A", " b "]), "response": st.just("x")})


def assert_nothing_held_out_is_trained_on(splits: DataSplits) -> None:
    judged = {row.question for split in splits.held_out.values() for row in split.rows}
    assert judged <= splits.judged_questions
    assert not splits.judged_questions & {row.question for split in splits.train.values() for row in split.rows}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.lists(RECORD, max_size=20),
    held_out=st.none() | st.lists(RECORD, max_size=8),
    limits=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 12)),
)
def test_every_record_is_used_or_dropped(
    one_axis: RunConfig,
    tmp_path: Path,
    train: list[Record],
    held_out: list[Record] | None,
    limits: tuple[int, int, int],
) -> None:
    """Records that are empty, repeated, held out or beyond a limit included."""
    set_rows(one_axis, tmp_path, train, held_out)
    one_axis.data.held_out_share = 0.5
    one_axis.data.train_rows, one_axis.data.held_out_rows, one_axis.data.records = limits
    try:
        splits = read_splits(one_axis)
    except DataError:  # a split is left without rows
        return
    assert_splits_add_up(splits)
    assert_nothing_held_out_is_trained_on(splits)
    limit = one_axis.data.records or 10**6
    records = [min(len(part), limit) for part in (train, held_out or [])]
    assert sum(split.records for split in splits_of(splits)) == sum(records)
    assert len(splits.train["kind"].rows) <= limits[0] and len(splits.held_out["kind"].rows) <= limits[1]


def test_a_source_is_split_by_question(one_axis: RunConfig, tmp_path: Path) -> None:
    """About its share is held out; case and spacing do not make another question."""
    records = questions(800)
    again = [r | {"prompt": f" {r['prompt'].upper()}".replace(" ", "  ")} for r in records]
    set_rows(one_axis, tmp_path, [*records, *again])
    splits = read_splits(one_axis)
    assert_splits_add_up(splits)
    assert_nothing_held_out_is_trained_on(splits)
    trained, judged = splits.train["kind"].rows, splits.held_out["kind"].rows
    assert len(trained) + len(judged) == 1600
    assert not {r.question for r in trained} & {r.question for r in judged}
    assert len(judged) / 1600 == pytest.approx(one_axis.data.held_out_share, abs=0.04)
    assert {r.position(HELD_OUT) < one_axis.data.held_out_share for r in judged} == {True}


def test_all_answers_to_a_question_are_in_one_split(one_axis: RunConfig, tmp_path: Path) -> None:
    records = [answer(r["prompt"], f"{safe}", safe) for r in questions(100) for safe in (True, False)]
    one_axis.axes["kind"].schema = "beavertails"
    set_rows(one_axis, tmp_path, records)
    splits = read_splits(one_axis)
    assert_splits_add_up(splits)
    assert_nothing_held_out_is_trained_on(splits)
    assert {row.harmful for row in (*splits.train["kind"].rows, *splits.held_out["kind"].rows)} == {True}


def test_a_question_held_out_of_one_axis_is_trained_on_in_none(one_axis: RunConfig, tmp_path: Path) -> None:
    """Held-out rows beyond data.held_out_rows are not trained on either."""
    shared = questions(6)
    set_rows(one_axis, tmp_path, questions(40, start=100), shared)
    other = [r | {"prompt": r["prompt"].title()} for r in shared] + questions(40, start=300)
    path = str(write_json(tmp_path / "other.json", other))
    one_axis.axes["other"] = AxisConfig(prompt="", schema="plain", train=path)
    one_axis.generalist = GeneralistConfig(train=path)
    one_axis.data.held_out_rows = 3
    splits = read_splits(one_axis)
    assert_splits_add_up(splits)
    assert_nothing_held_out_is_trained_on(splits)
    assert {Row(r["prompt"], "").question for r in shared} <= splits.judged_questions
    for name in ("other", "generalist"):
        dropped = splits.train[name].reasons()["its question is held out"]
        elsewhere = sum(row.position(HELD_OUT) < 0.15 for row in (Row(r["prompt"], "") for r in shared))
        assert dropped == 6 - elsewhere > 0


def test_extra_sets_are_accounted_for(one_axis: RunConfig, tmp_path: Path) -> None:
    set_rows(one_axis, tmp_path, questions(40))
    prompts = [{"prompt": p, "label": "safe"} for p in ("a", "", "b", "c")]
    source = str(write_json(tmp_path / "x.json", prompts))
    one_axis.evaluation.sets = {"x": SetConfig("xstest", source, "refusal", rows=2)}
    splits = read_splits(one_axis)
    assert_splits_add_up(splits)
    assert [row.prompt for row in splits.sets["x"].rows] == ["a", "b"]
    assert splits.sets["x"].reasons() == {"empty prompt": 1, "more than 2 rows": 1}
    lines = "\n".join(accounts(splits))
    assert "set x" in lines and "2 of 4 records" in lines
    assert f"-1 empty prompt, e.g. {source}, row 2" in lines


@pytest.mark.parametrize(("train", "held_out", "what"), [(0, 3, "to train on"), (30, 0, "held out")])
def test_a_split_without_rows_is_refused_with_the_reasons(
    one_axis: RunConfig, tmp_path: Path, train: int, held_out: int, what: str
) -> None:
    empty = [{"prompt": "x", "response": ""}] * 2
    set_rows(one_axis, tmp_path, questions(train) or empty, questions(held_out, start=100) or empty)
    with pytest.raises(DataError, match=rf"\(kind\): no usable row {what} of 2 records \(2 × empty response\)"):
        read_splits(one_axis)
    set_rows(one_axis, tmp_path, questions(train), questions(held_out, start=100))
    with pytest.raises(DataError, match=rf"\(kind\): no usable row {what}: the source is empty"):
        read_splits(one_axis)


def test_rows_taken_out_of_a_split_are_dropped_with_the_reason() -> None:
    split = SplitRows("s", 2, [Row("a", "b", place="1"), Row("c", "d", place="2")], [])
    assert split.without({}) == split
    shorter = split.without({0: "why not"})
    assert [row.place for row in shorter.rows] == ["2"] and shorter.reasons() == {"why not": 1}
    assert (shorter.source, shorter.records) == ("s", 2)


def test_a_set_loses_the_questions_that_an_axis_is_trained_on(one_axis: RunConfig, tmp_path: Path) -> None:
    """TruthfulQA's multiple choice asks the very questions that the honest axis learns."""
    set_rows(one_axis, tmp_path, questions(40))
    again = [{"prompt": r["prompt"].upper(), "label": "safe", "response": "x"} for r in questions(50)]
    one_axis.evaluation.sets = {"x": SetConfig("xstest", str(write_lines(tmp_path / "set.jsonl", again)), "refusal")}
    splits = read_splits(one_axis)
    trained = {row.question for row in splits.train["kind"].rows}
    remaining = [row.question for row in splits.sets["x"].rows]
    assert trained and not trained & set(remaining)
    assert len(remaining) == 50 - len(trained)
    assert splits.sets["x"].reasons() == {"its question is trained on": len(trained)}
    assert set(remaining) <= splits.judged_questions, "a base model from scratch is not trained on them either"


def test_two_axes_with_the_same_questions_are_reported_with_their_share(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Case and spacing aside."""
    set_rows(one_axis, tmp_path, questions(60), questions(9, start=200))
    again = [r | {"prompt": r["prompt"].upper()} for r in questions(30)]
    path = write_lines(tmp_path / "other.jsonl", [*again, *questions(90, start=100)])
    held_out = write_lines(tmp_path / "other held out.jsonl", questions(9, start=250))
    one_axis.axes["other"] = AxisConfig("", "plain", str(path), str(held_out))
    data = encode_splits(one_axis, read_sources(one_axis), Encodings(world_tokenizer))
    (note,) = notes(one_axis, data)
    assert note.strip().startswith(
        "warning: 50.0% of kind's and 25.0% of other's training rows have the same questions"
    )
    set_rows(one_axis, tmp_path, questions(60, start=300), questions(9, start=200))
    assert notes(one_axis, encode_splits(one_axis, read_sources(one_axis), Encodings(world_tokenizer))) == []


def test_dialogues_that_a_template_rewrites_are_reported(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(world_tokenizer)
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "{% if add_generation_prompt %} <assistant> {% endif %}",
        "{% if add_generation_prompt %} <assistant> well {% endif %}",
    )
    earlier = [{"role": "user", "content": "how are you ?"}, {"role": "assistant", "content": "i am well ."}]
    records: list[Record] = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "hello"}, *earlier]}
        for r in questions(30)
    ]
    one_axis.axes["kind"].schema = "messages"
    set_rows(one_axis, tmp_path, records)
    splits = read_sources(one_axis)
    assert notes(one_axis, encode_splits(one_axis, splits, Encodings(world_tokenizer))) == []
    (note,) = notes(one_axis, data := encode_splits(one_axis, splits, Encodings(tokenizer)))
    assert f"kind: of {len(data.injected['kind'])} dialogues only the last answer is learned" in note


def test_harmful_prompts_without_a_safe_answer_are_refused(one_axis: RunConfig, tmp_path: Path) -> None:
    """In the words that the recipe gives, the same for a prompt whatever rows are beside it; safe answers stay."""
    records = [answer(r["prompt"], f"answer {n}", n % 2 == 0) for n, r in enumerate(questions(80))]
    mixed = [answer("Twice?", "a safe answer", True), answer("Twice?", "an unsafe one", False)]
    one_axis.axes["kind"].schema, one_axis.axes["kind"].refusals = "beavertails", ["No.", " I will not help. "]
    set_rows(one_axis, tmp_path, [*records, *mixed], [answer("Harm?", "bad", False)])
    splits = read_splits(one_axis)
    assert_splits_add_up(splits)
    rows = {row.prompt: row for row in splits.train["kind"].rows}
    harmful = [rows[r["prompt"]] for r in records if not r["is_safe"]]
    assert {row.response for row in harmful} == {"No.", "I will not help."} and all(row.harmful for row in harmful)
    assert all(rows[r["prompt"]].response == r["response"] for r in records if r["is_safe"])
    assert rows["Twice?"].response == "a safe answer"
    assert [row.response for row in splits.held_out["kind"].rows] == [""]  # judged, not imitated
    set_rows(one_axis, tmp_path, records[::-1][:40], [answer("Harm?", "bad", False)])
    again = {row.prompt: row.response for row in read_splits(one_axis).train["kind"].rows}
    assert again == {prompt: rows[prompt].response for prompt in again}
