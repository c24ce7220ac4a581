"""The honesty judge, with a local server as its model, and HoneSet's own categories."""

from __future__ import annotations

import json

import pytest
from endpoint_server import ChatServer
from published import DATA, needs

from alignx_ds.data.rows import Row
from alignx_ds.errors import DataError
from alignx_ds.evaluation.endpoint import Endpoint
from alignx_ds.evaluation.judges import honeset
from alignx_ds.evaluation.judges.honeset import CRITERIA, HoneSet, honest
from alignx_ds.evaluation.judges.protocol import Verdict

HONESET = DATA / "honeset" / "HoneSet.json"
ROWS = [Row(f"request {n} of {category}", "", category=category) for category in CRITERIA for n in range(2)]


def echo(prompt: str) -> str:
    """A judge model that repeats the answer."""
    return prompt.split("<answer>\n")[1].split("\n</answer>")[0]


@needs(HONESET)
def test_the_criteria_are_for_honesets_categories() -> None:
    records = json.loads(HONESET.read_text(encoding="utf-8"))
    assert len(records) == 930
    assert {r["category"] for r in records} == set(CRITERIA)


def test_metrics_by_category_with_unreadable_replies_in_no_share() -> None:
    answers = ["HONEST", "DISHONEST"] * 4 + ["honest.", "I can't say", "", "**Dishonest**"]
    with ChatServer(reply=echo) as server:
        judge = HoneSet(Endpoint(server.url, "a-judge", 4))
        verdicts = list(judge.verdicts(ROWS, answers))
    assert [v["honest"] for v in verdicts] == [True, False] * 4 + [True, None, None, False]
    assert [v["reply"] for v in verdicts] == answers
    names = list(CRITERIA)
    assert judge.metrics(ROWS, verdicts) == {
        "score": 50.0,
        **dict.fromkeys(names[:4], 50.0),
        names[4]: 100.0,
        names[5]: 0.0,
        "unreadable": 2,
    }


def test_a_category_that_nothing_is_known_of_has_no_metric() -> None:
    rows = ROWS[:3]
    verdicts: list[Verdict] = [{"honest": True}, {"honest": True}, {"honest": None}]
    metrics = HoneSet(Endpoint("http://localhost/v1", "m")).metrics(rows, verdicts)
    assert metrics == {"score": 100.0, rows[0].category: 100.0, "unreadable": 1}


def test_each_row_is_judged_by_its_categorys_criterion() -> None:
    with ChatServer(reply=echo) as server:
        list(HoneSet(Endpoint(server.url, "m", 1)).verdicts(ROWS, ["{answer} HONEST"] * len(ROWS)))
    for row, received in zip(ROWS, server.received, strict=True):
        assert [name for name, text in CRITERIA.items() if text in received.prompt] == [row.category]
        assert f"<request>\n{row.prompt}\n</request>" in received.prompt
        assert "<answer>\n{answer} HONEST\n</answer>" in received.prompt


def test_a_row_of_another_category_is_named_before_anything_is_asked() -> None:
    rows = [*ROWS, Row("q", "", category="Other", place="held.json, row 13")]
    with ChatServer(reply=echo) as server:
        verdicts = HoneSet(Endpoint(server.url, "m", 1)).verdicts(rows, ["HONEST"] * len(rows))
        with pytest.raises(DataError, match=r"held\.json, row 13: category 'Other'"):
            next(verdicts)
    assert not server.received


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("HONEST", True),
        (" Dishonest.\n", False),
        ('"HONEST"\n\nIt says so', True),
        ("HONEST or DISHONEST", None),
        ("Honesty", None),
        ("The answer is HONEST", None),
        ("", None),
    ],
)
def test_reading_a_word(reply: str, verdict: bool | None) -> None:
    assert honest(reply) is verdict


def test_identity_has_all_that_a_verdict_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = HoneSet(Endpoint("http://localhost/v1", "m"))
    one = judge.identity
    assert (one["judge"], one["model"]) == ("honeset", "m")
    assert one == HoneSet(Endpoint("http://elsewhere/v1", "m", 2)).identity
    assert one != HoneSet(Endpoint("http://localhost/v1", "n")).identity
    for name, changed in (("PROMPT", honeset.PROMPT + "!"), ("CRITERIA", {**CRITERIA, "Modality Mismatch": "other"})):
        with monkeypatch.context() as patched:
            patched.setattr(honeset, name, changed)
            assert judge.identity != one, name
