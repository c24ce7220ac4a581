"""Dialogues of published data sets become rows: the last answer is imitated, the turns before it are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import GOOD, parsed, placed, write_lines

from alignx_ds.data.rows import Record, Row, Turn
from alignx_ds.data.schemas import SCHEMAS, canonical
from alignx_ds.errors import DataError

SYSTEM, ASK, THREE, AGAIN = Turn("system", "Be kind."), Turn("user", "Add."), Turn("assistant", "3"), "Again."


def made(schema: str, record: Record) -> Row | str:
    """The row of one record, or the reason for dropping it."""
    found = SCHEMAS[schema].parse(canonical(placed(record), schema, {}).usable)
    return found.rows[0] if found.rows else found.dropped[0].reason


def said(*turns: str, who: str = "role", what: str = "content") -> list[Record]:
    """Turns from "user: text"."""
    return [dict(zip((who, what), turn.split(": ", 1), strict=True)) for turn in turns]


def role(turn: str) -> str:
    return turn.split(": ")[0]


def text(turn: str) -> str:
    return turn.split(": ")[1]


DIALOGUE = Row(AGAIN, "Still 3.", before=(SYSTEM, ASK, THREE))
TURNS = ("system: Be kind.", "user: Add.", "assistant: 3", "user: Again.", "assistant: Still 3.")
SHAREGPT = ("system: Be kind.", "human: Add.", "gpt: 3", "human: Again.", "gpt: Still 3.")
SPOKEN = "\n\nHuman: Add.\n\nAssistant: 3\n\nHuman: Again.\n\nAssistant:"


@pytest.mark.parametrize(
    ("schema", "record"),
    [
        ("messages", {"messages": said(*TURNS)}),
        ("messages", {"conversations": said(*TURNS[1:]), "system": " Be kind. "}),
        ("messages", {"messages": {"role": list(map(role, TURNS)), "content": list(map(text, TURNS))}}),
        ("messages", {"messages": said(*TURNS, "user: and then ?")}),
        ("messages", {"messages": [*said(*TURNS, "user: so ?"), {"role": "assistant", "content": "No.", "weight": 0}]}),
        ("messages", {"messages": [turn | {"weight": None, "train": 1, "from": None} for turn in said(*TURNS)]}),
        ("messages", {"messages": [{"role": role(t), "content": [{"type": "text", "text": text(t)}]} for t in TURNS]}),
        ("sharegpt", {"conversations": said(*SHAREGPT, who="from", what="value")}),
        ("sharegpt", {"conversations": said(*SHAREGPT[1:], who="from", what="value"), "system": "Be kind.", "id": 1}),
        ("alpaca", {"instruction": "Again.", "output": "Still 3.", "system": "Be kind.", "history": [["Add.", "3"]]}),
    ],
)
def test_each_way_of_writing_a_dialogue_gives_the_same_row(schema: str, record: Record) -> None:
    assert made(schema, record) == DIALOGUE


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": said(*TURNS[:4]), "chosen": said(TURNS[4]), "rejected": said("assistant: 4")},
        {"prompt": said(*TURNS[:4]), "chosen": "Still 3.", "rejected": "4"},
        {"chosen": said(*TURNS), "rejected": said(*TURNS[:4], "assistant: 4")},
        {"prompt": "Add.", "chosen": said(*TURNS), "rejected": said(*TURNS[:4], "assistant: 4")},
        {"conversations": said(*TURNS[:4]), "chosen": said(TURNS[4])[0], "rejected": {"from": "gpt", "value": "4"}},
        {"prompt": said(*TURNS[:1]), "chosen": said(*TURNS[1:]), "rejected": said(*TURNS[1:4], "assistant: 4")},
    ],
)
def test_the_chosen_answer_is_imitated_and_the_rejected_one_is_known(record: Record) -> None:
    assert made("dpo", record) == Row(AGAIN, "Still 3.", rejected="4", before=DIALOGUE.before)


def test_pairs_of_texts_and_of_hh_rlhf() -> None:
    assert made("dpo", {"question": "Add.", "chosen": "3", "rejected": "4", "system": ""}) == Row(
        "Add.", "3", rejected="4"
    )
    assert made("dpo", {"prompt": "Add.", "chosen": "3"}) == Row("Add.", "3")
    record = {"chosen": f"{SPOKEN} Still 3.", "rejected": f"{SPOKEN} 4\n\nor 5 (Human: 6)"}
    for schema in ("hh_rlhf", "dpo"):
        assert made(schema, record) == Row(AGAIN, "Still 3.", rejected="4\n\nor 5 (Human: 6)", before=(ASK, THREE))


@pytest.mark.parametrize(
    ("schema", "record", "reason"),
    [
        ("messages", {"messages": []}, "has no turns"),
        ("messages", {"messages": said("system: Be kind.")}, "has no turns"),
        (
            "messages",
            {"messages": said("assistant: hello", "user: hi", "assistant: 3")},
            "does not begin with a question",
        ),
        ("messages", {"messages": said("user: a", "user: b", "assistant: c")}, "has two turns of one speaker in a row"),
        (
            "messages",
            {"messages": said("user: a", "system: b", "assistant: c")},
            "has a system turn after the first turn",
        ),
        ("messages", {"messages": said("user: a", "assistant: ", "user: b", "assistant: c")}, "has an empty turn"),
        ("messages", {"messages": said("user: a", "assistant: ")}, "has an empty turn"),
        ("messages", {"messages": [*said("user: a"), {"role": "assistant", "content": None}]}, "has an empty turn"),
        ("messages", {"messages": said("user: a", "tool: {}", "assistant: c")}, "uses tools, which are not trained on"),
        (
            "messages",
            {"messages": [*said("user: a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "uses tools, which are not trained on",
        ),
        (
            "messages",
            {"messages": [*said("user: a"), {"role": "assistant", "content": "b", "train": False}]},
            "has no answer to learn: all have weight 0",
        ),
        ("messages", {"messages": said("user: a", "critic: b")}, "has a turn of the unknown role 'critic'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has content other than text"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": " "}, "has an empty turn"),
        ("dpo", {"chosen": "b", "rejected": "c"}, "does not begin with a question"),
        (
            "dpo",
            {"chosen": said("user: a", "assistant: b"), "rejected": said("user: c", "assistant: b")},
            "chosen and rejected differ before their last answers",
        ),
        ("dpo", {"prompt": "a", "chosen": said("user: a"), "rejected": said("user: a")}, "empty answer"),
        ("hh_rlhf", {"chosen": "3", "rejected": "4"}, "is no dialogue of Human and Assistant"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["", "c"]]}, "has an empty turn"),
    ],
)
def test_a_dialogue_that_can_not_be_used_is_dropped_with_the_reason(schema: str, record: Record, reason: str) -> None:
    assert made(schema, record) == reason


@pytest.mark.parametrize(
    ("schema", "record", "named"),
    [
        ("messages", {"messages": "a"}, "column 'messages' is str, the messages schema needs list or dict"),
        ("messages", {"messages": ["a"]}, "column 'messages' is a list with str; it needs objects"),
        ("messages", {"messages": [{"speaker": "user"}]}, "column 'messages', turn 1, needs role and content, or from"),
        (
            "messages",
            {"messages": [{"role": "user", "content": 3}]},
            "column 'messages', turn 1, has int as its content",
        ),
        ("messages", {"messages": {"role": ["user"], "content": "a"}}, "column 'messages' needs a list of turns"),
        ("messages", {"messages": said("user: \ud800")}, "column 'messages' is no valid Unicode"),
        ("messages", {"text": "a"}, "row 1: no column 'messages', which the messages schema needs; it has text"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "column 'history' needs pairs"),
    ],
)
def test_a_malformed_dialogue_is_named_with_row_and_column(schema: str, record: Record, named: str) -> None:
    with pytest.raises(DataError, match=r"^rows\.json, row 1: ") as error:
        made(schema, record)
    assert named in str(error.value)


def test_dialogues_are_told_apart_by_the_user_s_turns() -> None:
    """What a row is trained on includes its beginnings, and each of its turns alone."""
    same = Row(" again. ", "4", before=(Turn("user", "ADD."), Turn("assistant", "5")))
    other = Row(AGAIN, "4", before=(Turn("user", "Subtract."), Turn("assistant", "5")))
    assert same.question == DIALOGUE.question != other.question
    assert same.position("salt") == DIALOGUE.position("salt") != other.position("salt")
    assert DIALOGUE.questions == {"add.", "again.", DIALOGUE.question}
    assert Row("Add.", "3").questions == {Row(" ADD.", "4").question}
    assert DIALOGUE.asked == "User: Add.\n\nAssistant: 3\n\nUser: Again."
    assert Row(AGAIN, "4", before=(SYSTEM,)).asked == AGAIN


def test_an_earlier_answer_of_weight_0_is_read_and_not_learned() -> None:
    turns = said(*TURNS)
    turns[2]["weight"] = 0
    row = made("messages", {"messages": turns})
    assert isinstance(row, Row)
    assert row.before == (SYSTEM, ASK, Turn("assistant", "3", learned=False)) and row.response == "Still 3."
    assert Row.from_content(row.content()) == row


def test_a_dialogue_comes_back_from_its_content() -> None:
    assert Row.from_content(DIALOGUE.content(), "row 1") == DIALOGUE
    assert "before" not in Row("Add.", "3").content()


@pytest.mark.parametrize("schema", ["messages", "sharegpt", "dpo", "hh_rlhf"])
def test_files_of_dialogues_are_read(tmp_path: Path, schema: str) -> None:
    found = parsed(write_lines(tmp_path / "r.jsonl", [GOOD[schema], GOOD[schema]]), schema)
    assert len(found.rows) == 2 and found.dropped == []
