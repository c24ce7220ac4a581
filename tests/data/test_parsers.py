"""How records of the published data sets become rows; each one is a row or is dropped with a reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import GOOD, answer, assert_all_accounted_for, placed

from alignx_ds.data.parsers import NO_OUTPUT, Parsed
from alignx_ds.data.rows import Record, Row
from alignx_ds.data.schemas import SCHEMAS, canonical
from alignx_ds.errors import DataError

WORDS = st.sampled_from(["", " ", "a", "A ", "b", "<nooutput>", "<noinput>", "a; b"])  # prompts often repeat
CHOICE = st.dictionaries(WORDS.map(str.strip), st.sampled_from([0, 1]), min_size=1)
SPOKEN = st.lists(st.sampled_from(["\n\nHuman: a", "\n\nAssistant: b", "\n\nAssistant:", "c"]), max_size=5).map("".join)


def turns(who: str, what: str, speakers: list[str]) -> st.SearchStrategy[list[Record]]:
    """A list of turns, often in a good order."""
    anything = st.lists(st.fixed_dictionaries({who: st.sampled_from(speakers), what: WORDS}), max_size=5)
    user, answerer = ("human", "gpt") if who == "from" else ("user", "assistant")
    good = st.lists(WORDS, max_size=5).map(
        lambda said: [{who: (user, answerer)[n % 2], what: text} for n, text in enumerate(said)]
    )
    return anything | good


RECORDS: dict[str, st.SearchStrategy[Record]] = {
    "alpaca": st.fixed_dictionaries(
        {"instruction": WORDS, "input": WORDS, "output": WORDS},
        optional={"system": WORDS, "history": st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=2)},
    ),
    "beavertails": st.builds(answer, WORDS, WORDS, st.booleans()),
    "truthfulqa": st.fixed_dictionaries(dict.fromkeys(GOOD["truthfulqa"], WORDS)),
    "plain": st.fixed_dictionaries({"prompt": WORDS, "response": WORDS}),
    "truthfulqa_mc": st.fixed_dictionaries(
        {"question": WORDS, "mc1_targets": st.builds(lambda right: {right: 1, "no": 0}, WORDS), "mc2_targets": CHOICE}
    ),
    "preference": st.fixed_dictionaries(
        {"instruction": WORDS, "input": WORDS, "output": st.lists(WORDS, min_size=2, max_size=2)}
    ),
    "alpaca_eval": st.fixed_dictionaries({"instruction": WORDS, "output": WORDS, "dataset": WORDS}),
    "honeset": st.fixed_dictionaries({"instruction": WORDS, "category": WORDS}),
    "xstest": st.fixed_dictionaries({"prompt": WORDS, "label": st.sampled_from(["safe", "unsafe"])}),
    "xstest_answers": st.fixed_dictionaries(
        {"prompt": WORDS, "type": st.sampled_from(["homonyms", "contrast_homonyms"]), "completion": WORDS}
    ),
    "prompts": st.fixed_dictionaries({"prompt": WORDS, "category": WORDS}),
    "messages": st.fixed_dictionaries({"messages": turns("role", "content", ["system", "user", "assistant", "tool"])}),
    "labelled": st.fixed_dictionaries(
        {
            "messages": turns("role", "content", ["system", "user", "assistant", "tool"]),
            "needs": st.lists(WORDS, max_size=3),
            "category": WORDS | st.none(),
            "harmful": st.booleans() | st.none(),
        }
    ),
    "sharegpt": st.fixed_dictionaries(
        {"conversations": turns("from", "value", ["human", "gpt", "system", "critic"]), "system": WORDS}
    ),
    "dpo": st.fixed_dictionaries(
        {"prompt": WORDS, "chosen": WORDS | turns("role", "content", ["user", "assistant"]), "rejected": WORDS}
    ),
    "hh_rlhf": st.fixed_dictionaries({"chosen": SPOKEN, "rejected": SPOKEN}),
}


def reasons(made: Parsed) -> list[str]:
    return [d.reason for d in made.dropped]


@given(st.data(), st.sampled_from(sorted(SCHEMAS)), st.booleans())
def test_every_record_is_a_row_or_dropped_with_a_reason(data: st.DataObject, schema: str, held_out: bool) -> None:
    records = placed(*data.draw(st.lists(RECORDS[schema], max_size=12)))
    made = SCHEMAS[schema].held_out(records) if held_out else SCHEMAS[schema].parse(records)
    assert_all_accounted_for(records, made)
    questions = {place: Row(SCHEMAS[schema].question(record), "").question for place, record in records}
    for row in made.rows:
        assert row.prompt == row.prompt.strip() != ""
        assert row.question == questions[row.place], "sources are split by this question before they are parsed"


@pytest.mark.parametrize(
    ("given_input", "prompt"),
    [("", "Add."), ("  ", "Add."), ("1 2", "Add.\n1 2"), (" 1 2\n", "Add.\n1 2"), ("<noinput>", "Add.")]
    + [(marker, "Add.") for marker in ("No input", "noinput.", '"N/A"')],
)
def test_alpaca_joins_instruction_and_input(given_input: str, prompt: str) -> None:
    record = {"instruction": " Add. ", "input": given_input, "output": " 3\n"}
    assert SCHEMAS["alpaca"].parse(placed(record)).rows == [Row(prompt, "3")]


@pytest.mark.parametrize(
    ("schema", "changes", "reason"),
    [
        ("alpaca", {"instruction": " "}, "empty instruction"),
        ("alpaca", {"output": "\n"}, "empty output"),
        ("alpaca", {"output": "<noOutput>"}, f"marked {NO_OUTPUT}"),
        ("beavertails", {"prompt": ""}, "empty prompt"),
        ("beavertails", {"response": " "}, "empty response"),
        ("truthfulqa", {"Question": " "}, "empty question"),
        ("truthfulqa", {"Best Answer": " "}, "empty best answer"),
        ("truthfulqa_mc", {"question": " "}, "empty question"),
        ("truthfulqa_mc", {"mc1_targets": {" ": 1}}, "empty best answer"),
        ("plain", {"prompt": ""}, "empty prompt"),
        ("plain", {"response": ""}, "empty response"),
        ("preference", {"instruction": " "}, "empty instruction"),
        ("preference", {"output": ["3", " "]}, "empty answer"),
        ("alpaca_eval", {"instruction": ""}, "empty instruction"),
        ("prompts", {"prompt": ""}, "empty prompt"),
    ],
)
def test_a_record_without_text_is_dropped_with_the_reason(schema: str, changes: Record, reason: str) -> None:
    made = SCHEMAS[schema].parse(placed(GOOD[schema] | changes, GOOD[schema]))
    assert [(d.place, d.reason) for d in made.dropped] == [("rows.json, row 1", reason)]
    assert len(made.rows) == 1


def test_beavertails_imitates_safe_answers_and_keeps_the_prompts_without_one() -> None:
    records = placed(
        *(answer("a", "bad", False), answer("a", "good", True), answer("b", "fine", True)),
        *(answer("c", "bad", False), answer("c", "worse", False)),
    )
    made = SCHEMAS["beavertails"].parse(records)
    assert made.rows == [
        Row("a", "good", harmful=True, incorrect=("bad",)),
        Row("b", "fine"),
        Row("c", "", harmful=True, incorrect=("bad", "worse")),
    ]
    assert reasons(made) == ["unsafe answer, not imitated"] * 2


def test_beavertails_held_out_has_one_row_per_prompt() -> None:
    records = placed(
        answer("a", "bad", False), answer("a", "good", True), answer("b", "fine", True), answer("c", "bad", False)
    )
    made = SCHEMAS["beavertails"].held_out(records)
    assert made.rows == [Row("a", "good", harmful=True), Row("b", "fine"), Row("c", "", harmful=True)]
    assert [row.place for row in made.rows] == [f"rows.json, row {n}" for n in (2, 3, 4)]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), min_size=1, max_size=12))
def test_a_prompt_is_harmful_when_any_of_its_answers_is_unsafe(answers: list[tuple[str, bool]]) -> None:
    """In whatever order the answers come, and its reference is a safe answer wherever there is one."""
    records = placed(*(answer(p, f"{p} {s}", s) for p, s in answers))
    judged, trained = SCHEMAS["beavertails"].held_out(records).rows, SCHEMAS["beavertails"].parse(records).rows
    assert sorted(row.prompt for row in judged) == sorted({p for p, _ in answers})
    for row in (*judged, *trained):
        verdicts = [safe for prompt, safe in answers if prompt == row.prompt]
        assert row.harmful is (not all(verdicts))
        assert row.response == (f"{row.prompt} True" if any(verdicts) else "")


def test_beavertails_texts_hold_the_unsafe_answers_too() -> None:
    records = placed(answer("a", "bad", False), answer("a", "good", True), answer("b", " ", False))
    assert SCHEMAS["beavertails"].texts(records) == [Row("a", "bad"), Row("a", "good")]


def test_truthfulqa_splits_its_lists() -> None:
    (row,) = SCHEMAS["truthfulqa"].parse(placed(GOOD["truthfulqa"] | {"Correct Answers": " Thus. ;; Hence.;"})).rows
    assert (row.prompt, row.response) == ("Why?", "So.")
    assert set(row.correct) == {"So.", "Thus.", "Hence."}  # the best answer is a correct one
    assert row.incorrect == ("No.",)


def test_both_spellings_of_truthfulqa_give_the_same_row() -> None:
    hub = {
        "question": "Why?",
        "best_answer": "So.",
        "correct_answers": ["So.", "Thus.", " "],
        "incorrect_answers": ["No."],
    }
    records = canonical(placed(GOOD["truthfulqa"], hub), "truthfulqa", {}).usable
    first, second = SCHEMAS["truthfulqa"].parse(records).rows
    assert first == second == Row("Why?", "So.", correct=("So.", "Thus."), incorrect=("No.",))


def test_truthfulqa_texts_hold_the_wrong_answers_too() -> None:
    texts = SCHEMAS["truthfulqa"].texts(placed(GOOD["truthfulqa"]))
    assert texts == [Row("Why?", text) for text in ("So.", "Thus.", "No.")]


def test_both_forms_of_multiple_choice_give_the_same_row() -> None:
    hub = {
        "question": "Why?",
        "mc1_targets": {"choices": ["So.", "No."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["So.", "Thus.", "No."], "labels": [1, 1, 0]},
    }
    both = [SCHEMAS["truthfulqa_mc"].parse(placed(record)).rows for record in (GOOD["truthfulqa_mc"], hub)]
    assert both[0] == both[1] == [Row("Why?", "So.", correct=("So.", "Thus."), incorrect=("No.",))]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("mc1_targets", {"So.": 2}),
        ("mc2_targets", {"So.": None}),
        ("mc1_targets", {"choices": ["So.", "No."], "labels": [1]}),
        ("mc2_targets", {"choices": ["So.", 3], "labels": [1, 0]}),
        ("mc1_targets", {"choices": "So.", "labels": 1}),
        ("mc2_targets", {"choices": ["So.", " So."], "labels": [1, 0]}),
    ],
)
def test_malformed_choices_are_named(column: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"^rows\.json, row 2: column '{column}'"):
        SCHEMAS["truthfulqa_mc"].parse(placed(GOOD["truthfulqa_mc"], GOOD["truthfulqa_mc"] | {column: value}))


@pytest.mark.parametrize("targets", [{}, {"So.": 0}, {"So.": 1, "Thus.": 1}])
def test_multiple_choice_needs_exactly_one_right_answer(targets: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"row 1: column 'mc1_targets' has \d right answers; it needs exactly one"):
        SCHEMAS["truthfulqa_mc"].parse(placed(GOOD["truthfulqa_mc"] | {"mc1_targets": targets}))


def test_a_preference_pair_has_a_chosen_and_a_rejected_answer() -> None:
    (row,) = SCHEMAS["preference"].parse(placed(GOOD["preference"] | {"input": "1 2"})).rows
    assert row == Row("Add.\n1 2", "3", rejected="4")
    with pytest.raises(DataError, match=r"row 1: column 'output' needs two texts"):
        SCHEMAS["preference"].parse(placed(GOOD["preference"] | {"output": ["3"]}))


def test_answers_to_xstests_unsafe_prompts_are_not_imitated() -> None:
    records = [
        {"prompt": " p ", "type": kind, "completion": text} for kind in ("a", "contrast_a") for text in (" c", "")
    ]
    parsed = SCHEMAS["xstest_answers"].parse(placed(*records))
    unsafe = Row("p", "", harmful=True, category="contrast_a")
    assert parsed.rows == [Row("p", "c", category="a"), unsafe, unsafe]
    assert [d.reason for d in parsed.dropped] == ["empty completion"]


def test_xstest_and_the_harmful_prompts_are_marked_as_harmful() -> None:
    safe, unsafe = SCHEMAS["xstest"].parse(placed(GOOD["xstest"], GOOD["xstest"] | {"label": "unsafe"})).rows
    assert (safe.harmful, unsafe.harmful) == (False, True)
    (row,) = SCHEMAS["prompts"].parse(placed(GOOD["prompts"])).rows
    assert row == Row("How?", "", harmful=True, category="animal_abuse")
