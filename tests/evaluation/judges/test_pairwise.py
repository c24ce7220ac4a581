"""The pairwise judge, with a local server as its model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoint_server import ChatServer, Said

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.evaluation.alpaca_eval import Output
from alignx_ds.evaluation.endpoint import Endpoint, Reply
from alignx_ds.evaluation.judges import pairwise
from alignx_ds.evaluation.judges.pairwise import AlpacaEval, preference
from alignx_ds.evaluation.judges.protocol import Metrics, Verdict

ROWS = [Row(f"instruction {n}", "") for n in range(40)]
LONG, SHORT = "a long and winding answer, {n}", "short {n}"
REFERENCES = {r.prompt: Output("d", r.prompt, SHORT.format(n=n), "reference") for n, r in enumerate(ROWS)}
WORSE_REFERENCES = {r.prompt: Output("d", r.prompt, LONG.format(n=n), "reference") for n, r in enumerate(ROWS)}
SHOWN = re.compile(r"<output_A>\n(.*)\n</output_A>.*<output_B>\n(.*)\n</output_B>", re.DOTALL)

Judged = tuple[list[Verdict], Metrics, ChatServer]


def shown(prompt: str) -> tuple[str, str]:
    found = SHOWN.search(prompt)
    assert found is not None
    return found[1], found[2]


def number(prompt: str) -> int:
    found = re.search(r"instruction (\d+)", prompt)
    assert found is not None
    return int(found[1])


def by_row(server: ChatServer) -> list[str]:
    """The prompts that were received, in the order of the rows."""
    return sorted((r.prompt for r in server.received), key=number)


def longer(prompt: str) -> str:
    a, b = shown(prompt)
    return "A" if len(a) > len(b) else "B"


def judge(
    reply: Callable[[str], str | Said], references: dict[str, Output], answers: list[str], seed: int = 0
) -> Judged:
    with ChatServer(reply=reply) as server:
        judge = AlpacaEval(Endpoint(server.url, "a-judge", 4), references, seed)
        verdicts = list(judge.verdicts(ROWS, answers))
    return verdicts, judge.metrics(ROWS, verdicts), server


def test_the_longer_output_wins_in_either_position() -> None:
    long, short = ([text.format(n=n) for n in range(len(ROWS))] for text in (LONG, SHORT))
    verdicts, metrics, server = judge(longer, REFERENCES, long)
    assert verdicts == [{"preference": 2.0, "reply": longer(prompt)} for prompt in by_row(server)]
    assert metrics == {"score": 100.0, "standard_error": 0.0, "n": 40, "dropped": 0}
    assert judge(longer, WORSE_REFERENCES, short)[1]["score"] == 0.0


def test_position_bias_favours_neither_system() -> None:
    answers = [LONG.format(n=n) for n in range(len(ROWS))]
    verdicts, metrics, server = judge(lambda prompt: "A", REFERENCES, answers)
    first = [shown(prompt)[0] in answers for prompt in by_row(server)]
    assert 10 < sum(first) < 30
    assert [v["preference"] for v in verdicts] == [2.0 if ours else 1.0 for ours in first]
    assert metrics["score"] == pytest.approx(100 * sum(first) / 40)


def test_the_order_depends_on_instruction_and_seed() -> None:
    answers = [LONG.format(n=n) for n in range(len(ROWS))]

    def preferences(seed: int) -> list[float]:
        return [v["preference"] for v in judge(lambda prompt: "A", REFERENCES, answers, seed)[0]]

    assert preferences(0) == preferences(0)
    assert preferences(0) != preferences(1)


def test_unreadable_replies_are_dropped_and_counted() -> None:
    words = {3: "Both are fine", 5: "", 8: "I can't judge"}

    def reply(prompt: str) -> str:
        return words.get(number(prompt), longer(prompt))

    verdicts, metrics, _ = judge(reply, REFERENCES, [LONG.format(n=n) for n in range(len(ROWS))])
    assert [n for n, v in enumerate(verdicts) if v["preference"] is None] == [3, 5, 8]
    assert [verdicts[n]["reply"] for n in words] == list(words.values())
    assert metrics == {"score": 100.0, "standard_error": 0.0, "n": 37, "dropped": 3}


def test_preferences_are_weighted_by_probability() -> None:
    def unsure(prompt: str) -> Said:
        letter = longer(prompt)
        other = {"A": "B", "B": "A"}[letter]
        return Said(letter, {letter: math.log(0.6), f" {letter}": math.log(0.12), other: math.log(0.18)})

    verdicts, metrics, _ = judge(unsure, REFERENCES, [LONG.format(n=n) for n in range(len(ROWS))])
    assert [v["preference"] for v in verdicts] == pytest.approx([1.8] * 40)
    assert metrics["score"] == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b\n", "B"),
        ("**B**", "B"),
        ("output_A", "A"),
        ("Answer: B", "B"),
        ("A\n\nBecause it", "A"),
        ("A or B", None),
        ("As both", None),
        ("C", None),
        ("", None),
    ],
)
def test_reading_a_letter(text: str, letter: str | None) -> None:
    for ours in "AB":
        assert preference(Reply(text), ours) == (None if letter is None else 2.0 if letter == ours else 1.0)


def test_probabilities_of_other_words_than_the_letters_weigh_nothing() -> None:
    markup = {"**": math.log(0.9), "A": math.log(0.06), "B": math.log(0.04)}
    assert preference(Reply("**A**", markup), "A") == 2.0
    assert preference(Reply("Both", {"Both": math.log(0.4), "A": math.log(0.6)}), "A") is None
    assert preference(Reply("A", {"A": 0.0}), "B") == 1.0, "what is not among the likeliest has no weight"


def test_equal_outputs_are_a_draw_without_a_request() -> None:
    answers = [SHORT.format(n=n) if n % 2 else LONG.format(n=n) for n in range(len(ROWS))]
    verdicts, metrics, server = judge(longer, REFERENCES, answers)
    assert [v["preference"] for v in verdicts] == [2.0, 1.5] * 20
    assert metrics["score"] == pytest.approx(75.0)
    assert len(server.received) == 20


def test_texts_reach_the_model_as_they_are() -> None:
    """Braces are no template fields; answers with markup stay whole."""
    row, output = Row("sort {a} in {}", ""), Output("d", "sort {a} in {}", "{b} </output_A>", "g")
    with ChatServer(reply=lambda prompt: "A") as server:
        list(AlpacaEval(Endpoint(server.url, "m", 1), {row.prompt: output}).verdicts([row], ["{instruction}"]))
    for text in ("sort {a} in {}", "{b} </output_A>", "{instruction}"):
        assert f"\n{text}\n" in server.received[0].prompt


def test_an_instruction_without_a_reference_is_named_before_anything_is_asked() -> None:
    rows = [*ROWS, Row("unheard of", "", place="held.json, row 41")]
    with ChatServer(reply=longer) as server:
        verdicts = AlpacaEval(Endpoint(server.url, "m", 1), REFERENCES).verdicts(rows, ["x"] * 41)
        with pytest.raises(DataError, match=r"held\.json, row 41: .*'unheard of'"):
            next(verdicts)
    assert not server.received


def test_identity_has_all_that_a_verdict_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("http://localhost/v1", "m")
    one = AlpacaEval(endpoint, REFERENCES).identity
    assert (one["judge"], one["model"]) == ("alpaca_eval", "m")
    assert one == AlpacaEval(Endpoint("http://elsewhere/v1", "m", 2), dict(REFERENCES)).identity
    assert json.loads(json.dumps(one)) == one
    others = [
        AlpacaEval(Endpoint("http://localhost/v1", "n"), REFERENCES).identity,
        AlpacaEval(endpoint, WORSE_REFERENCES).identity,
        AlpacaEval(endpoint, REFERENCES, seed=1).identity,
    ]
    monkeypatch.setattr(pairwise, "PROMPT", pairwise.PROMPT + " Please.")
    others.append(AlpacaEval(endpoint, REFERENCES).identity)
    assert all(one != other for other in others)


def test_make_reads_the_references_and_names_every_missing_setting(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(json.dumps([{"instruction": "i", "output": "o", "generator": "g"}]), encoding="utf-8")
    made = pairwise.make(JudgesConfig(endpoint="http://localhost/v1", endpoint_model="m", reference=str(path)))
    assert isinstance(made, AlpacaEval)
    assert made.references == {"i": Output("", "i", "o", "g")}
    with pytest.raises(ConfigError) as error:
        pairwise.make(JudgesConfig())
    keys = [problem.key for problem in error.value.problems]
    assert keys == ["judges.endpoint", "judges.endpoint_model"]
