"""The offline pairwise judge: what it learns, what it holds out, and the win rates and the quality that it reports."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import asdict, replace
from math import exp
from pathlib import Path

import pytest
from published import DATA, needs

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import HELD_OUT
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.evaluation.alpaca_eval import Annotation, Output, read_preferences
from alignx_ds.evaluation.judges.offline_pairwise import HELD_OUT_SHARE, OfflinePairwise, length_controlled, make

PUBLISHED = DATA / "alpaca_eval/preferences_gpt4_12models.jsonl.gz"
WORDS = "river stone lamp garden letter winter bridge market window song paper horse".split()
REFUSES = "Sorry, I cannot help with that. "
MODELS = [f"model-{n}" for n in range(8)]


def output(draw: random.Random) -> str:
    said = " ".join(draw.choices(WORDS, k=draw.randint(4, 40))).capitalize() + "."
    return REFUSES + said if draw.random() < 0.4 else said


def preferences() -> list[Annotation]:
    """What refuses loses; between two that do not, or two that do, the longer one wins."""
    draw, made = random.Random(0), []
    for n in range(60):
        instruction, first = f"Write about {draw.choice(WORDS)} number {n}.", output(draw)
        for model in MODELS:
            second = output(draw)
            ranks = [(REFUSES not in text, len(text)) for text in (first, second)]
            made.append(Annotation(instruction, first, "reference", second, model, "", 1.0 + (ranks[1] > ranks[0])))
    return made


def turned(annotation: Annotation) -> Annotation:
    return replace(annotation, preference=3.0 - (annotation.preference or 0))


def swapped(annotation: Annotation) -> tuple[Row, str]:
    return Row(annotation.instruction, annotation.output_2), annotation.output_1


def asked(annotations: list[Annotation]) -> tuple[list[Row], list[str]]:
    return [Row(a.instruction, a.output_1) for a in annotations], [a.output_2 for a in annotations]


@pytest.fixture(scope="module")
def judge() -> OfflinePairwise:
    return OfflinePairwise(preferences(), {})


def test_it_learns_more_than_length(judge: OfflinePairwise) -> None:
    quality = judge.quality
    assert quality["rows"] == len(judge.held_out) > 10
    assert quality["agreement"] > 0.9 > quality["length_alone"]
    assert quality["follows_length"] < 0.9
    assert quality["win_rate_error"] < 0.15
    said = "River stone lamp garden letter winter."
    (verdict,) = judge.verdicts([Row("Write about a lamp.", REFUSES + said)], [said])
    assert verdict["preference"] > 1.5 and verdict["longer"] == -len(REFUSES)


def test_swapped_outputs_have_the_opposite_verdict(judge: OfflinePairwise) -> None:
    rows, answers = asked(judge.held_out)
    given = [v["preference"] for v in judge.verdicts(rows, answers)]
    pairs = [swapped(a) for a in judge.held_out]
    opposite = [v["preference"] for v in judge.verdicts([row for row, _ in pairs], [text for _, text in pairs])]
    assert [3.0 - p for p in opposite] == pytest.approx(given)
    assert len(set(given)) > 5


def test_neither_instruction_nor_model_is_on_both_sides(judge: OfflinePairwise) -> None:
    for of in (lambda a: a.instruction, lambda a: a.generator_2):
        assert not {of(a) for a in judge.learned} & {of(a) for a in judge.held_out}
    assert len({a.generator_2 for a in judge.held_out}) == 2
    assert all(Row(a.instruction, "").position(HELD_OUT) < HELD_OUT_SHARE for a in judge.held_out)  # as the axes do


def test_what_it_holds_out_teaches_nothing(judge: OfflinePairwise) -> None:
    other = OfflinePairwise([*judge.learned, *map(turned, judge.held_out)], {})
    rows, answers = asked(judge.held_out)
    assert list(other.verdicts(rows, answers)) == list(judge.verdicts(rows, answers))
    assert other.quality["agreement"] == pytest.approx(1 - judge.quality["agreement"])
    assert other.identity != judge.identity


def test_made_twice_it_judges_the_same(judge: OfflinePairwise, tmp_path: Path) -> None:
    """From a file, too, whose draws and pairs without a preference are left out."""
    path = tmp_path / "preferences.jsonl.gz"
    undecided = [replace(a, preference=p) for a, p in zip(preferences(), (None, 0.0, 1.5), strict=False)]
    records = [{k: v for k, v in asdict(a).items() if k != "annotator"} for a in [*preferences(), *undecided]]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    again = make(JudgesConfig(preferences=str(path)))
    rows, answers = asked(judge.held_out)
    assert again.identity == judge.identity
    assert list(again.verdicts(rows, answers)) == list(judge.verdicts(rows, answers))


def test_metrics(judge: OfflinePairwise) -> None:
    rows = [Row("q", "") for _ in range(4)]
    verdicts = [{"preference": p, "longer": n} for p, n in ((1.9, 50), (1.7, 20), (1.5, 0), (1.3, 10))]
    metrics = judge.metrics(rows, verdicts)
    assert (metrics["score"], metrics["n"]) == (pytest.approx(60.0), 4)
    assert metrics["longer_wins"] == pytest.approx(200 / 3), "a draw is not a verdict for either"
    assert metrics["judge_agreement"] == judge.quality["agreement"]
    assert judge.metrics([], [])["score"] == 0.0


def test_references_are_the_rows_own_or_given() -> None:
    given = OfflinePairwise(preferences(), {"q": Output("", "q", "the same", "reference")})
    assert [v["preference"] for v in given.verdicts([Row("q", "another")], ["the same"])] == [1.5]
    assert given.applies(Row("q", "")) and given.applies(Row("x", "an answer")) and not given.applies(Row("x", ""))


def test_the_win_rate_at_equal_length() -> None:
    """A judge of length alone has 50 %, one that does not look at length its own win rate."""
    longer = [draw.randint(-100, 300) for draw in [random.Random(0)] for _ in range(400)]
    by_length = [1 + 1 / (1 + exp(-more / 40)) for more in longer]
    assert sum(p - 1 for p in by_length) / 400 > 0.65
    assert length_controlled(by_length, longer) == pytest.approx(50, abs=4)
    assert length_controlled([1.7, 1.7] * 200, longer) == pytest.approx(70, abs=1)
    assert length_controlled([1.7, 1.3, 2.0], [5, 5, 5]) == pytest.approx(200 / 3)
    assert length_controlled([2.0, 2.0], [1, 9]) == 100.0
    assert length_controlled([], []) == 0.0


def test_too_few_preferences() -> None:
    with pytest.raises(DataError, match="0 decided pairs of 1 models held out"):
        OfflinePairwise([a for a in preferences() if a.generator_2 == "model-0"] * 2, {})
    with pytest.raises(DataError, match="won by either side"):
        OfflinePairwise([replace(a, preference=2.0) for a in preferences()], {})


@pytest.mark.parametrize("path", ["", "nowhere/rows.jsonl"])
def test_preferences_must_be_a_file(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(JudgesConfig(preferences=path))
    assert [(p.key, p.given) for p in caught.value.problems] == [("judges.preferences", path)]


@pytest.mark.parametrize("column", ["instruction", "output_1", "output_2", "generator_2", "preference"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    record = {k: v for k, v in asdict(preferences()[0]).items() if k != column}
    (tmp_path / "p.json").write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(DataError, match=f"p.json, row 1: no column '{column}'"):
        make(JudgesConfig(preferences=str(tmp_path / "p.json")))


@needs(PUBLISHED)
def test_published_preferences() -> None:
    """Better than the majority and than length alone (0.779) on unseen instructions and models."""
    judge = OfflinePairwise(read_preferences(PUBLISHED), {})
    assert len(judge.learned) > 5000
    quality = judge.quality
    assert quality["rows"] > 450
    assert quality["agreement"] > max(quality["majority"] + 0.02, quality["length_alone"])
    assert quality["ece"] < 0.12
