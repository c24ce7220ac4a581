"""Joined rows: what is asked, what is answered, which experts are needed, and that the splits stay apart."""

from __future__ import annotations

import pytest

from alignx_ds.config.schema import JoinConfig
from alignx_ds.data.join import Joiner
from alignx_ds.data.rows import Row, Turn

HARM = Row("how do i hurt the dog ?", "no .", harmful=True)
QUESTION, TASK, CHAT = Row("what is blue ?", "the sky ."), Row("count to two .", "one two"), Row("hello .", "hi .")


def joined(axis: str, own: Row, guests: dict[str, list[Row]], answer: str = "refuse", share: float = 40.0) -> list[Row]:
    return Joiner({axis: [own], **guests}, seed=0).joined(axis, [own], JoinConfig(share, answer))


def one_message(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.before]


def test_a_share_of_joined_rows_is_made_and_the_same_every_time() -> None:
    rows = [Row(f"question {n} ?", f"answer {n} .") for n in range(20)]
    joiner = Joiner({"honest": rows, "helpful": [TASK]}, seed=3)
    made = joiner.joined("honest", rows, JoinConfig(0.5))
    assert len(made) == 10
    assert made == joiner.joined("honest", rows, JoinConfig(0.5))
    assert made != Joiner({"honest": rows, "helpful": [TASK]}, seed=4).joined("honest", rows, JoinConfig(0.5))
    assert joiner.joined("honest", rows, JoinConfig(0.0)) == []


def test_every_joined_row_has_its_own_row_in_company() -> None:
    rows = joined("honest", QUESTION, {"helpful": [TASK], "generalist": [CHAT]})
    assert any(row.before for row in rows) and any(not row.before for row in rows)
    for row in rows:
        assert QUESTION.prompt in row.prompt
        assert len(row.chat) > 1 or row.prompt != QUESTION.prompt
    prompts = {row.prompt.index(QUESTION.prompt) == 0 for row in one_message(rows)}
    assert prompts == {True, False}, "company stands before and after"


def test_benign_parts_are_answered_in_the_order_in_which_they_are_asked() -> None:
    for row in one_message(joined("honest", QUESTION, {"helpful": [TASK]})):
        asked = sorted(
            (row.prompt.index(part.prompt), part.response) for part in (QUESTION, TASK) if part.prompt in row.prompt
        )
        found = [row.response.index(answer) for _, answer in asked]
        assert found == sorted(found)
        assert set(row.needs) == {"honest", "helpful"} if TASK.prompt in row.prompt else set(row.needs) == {"honest"}


@pytest.mark.parametrize(("axis", "own", "guests"), [
    ("harmless", HARM, {"honest": [QUESTION]}),
    ("honest", QUESTION, {"harmless": [HARM]}),
])  # fmt: skip
def test_a_message_that_asks_for_harm_is_refused_as_a_whole(axis: str, own: Row, guests: dict[str, list[Row]]) -> None:
    harmful = [row for row in one_message(joined(axis, own, guests)) if HARM.prompt in row.prompt]
    assert harmful
    assert all(row.response == "no ." and row.harmful and row.needs == ("harmless",) for row in harmful)


def test_a_harmful_earlier_turn_does_not_make_the_last_one_harmful() -> None:
    dialogues = [row for row in joined("honest", QUESTION, {"harmless": [HARM]}) if row.before]
    after_harm = [row for row in dialogues if row.before[0].text == HARM.prompt]
    assert after_harm
    for row in after_harm:
        assert row.before == (Turn("user", HARM.prompt), Turn("assistant", HARM.response, learned=False))
        assert (row.response, row.harmful, row.needs) == (QUESTION.response, False, ("honest",))


def test_both_answers_harm_and_the_rest_and_own_answers_its_own_part() -> None:
    for row in one_message(joined("harmless", HARM, {"honest": [QUESTION]}, "both")):
        assert HARM.response in row.response and (QUESTION.prompt in row.prompt) == (QUESTION.response in row.response)
    for row in one_message(joined("honest", QUESTION, {"harmless": [HARM]}, "own")):
        assert (row.response, row.needs) == (QUESTION.response, ("honest",))


def test_the_generalist_is_needed_only_where_no_axis_is() -> None:
    for row in one_message(joined("honest", QUESTION, {"generalist": [CHAT]})):
        assert row.needs == ("honest",)


def test_a_system_prompt_stays_first_and_dialogues_are_no_company() -> None:
    system = Turn("system", "be brief .")
    own = Row(
        "and what else ?", "the sea .", before=(system, Turn("user", "what is blue ?"), Turn("assistant", "sky ."))
    )
    rows = joined("honest", own, {"helpful": [TASK]})
    assert all(row.before[0] == system for row in rows)
    assert all(row.prompt.count("and what else ?") == 1 for row in rows)
