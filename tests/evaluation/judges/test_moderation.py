"""Moderation models, on tiny ones whose verdicts follow from the words that they read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_judges import CHAT, HARMS, beaver_dam, guard, tokenizer, yes_or_no

from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError
from alignx_ds.evaluation.judges.moderation import (
    BEAVER_TOKENS,
    CATEGORIES,
    BeaverDam,
    LlamaGuard,
    agreement,
)
from alignx_ds.evaluation.judges.protocol import Verdict

ANSWERS = ["fine", "harm3 it is", "", "one two three four harm0 and harm13 five six seven", "all good here"]
ROWS = [Row(f"question {n}", "", harmful=n < 2) for n in range(len(ANSWERS))]
HITS: list[list[str]] = [[], [CATEGORIES[3]], [], [CATEGORIES[0], CATEGORIES[13]], []]


@pytest.fixture(scope="module")
def dam(tmp_path_factory: pytest.TempPathFactory) -> str:
    return beaver_dam(tmp_path_factory.mktemp("dam"))


@pytest.fixture(scope="module")
def guarding(tmp_path_factory: pytest.TempPathFactory) -> str:
    return guard(tmp_path_factory.mktemp("guard"))


def same(some: list[Verdict], others: list[Verdict]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one == {**other, "probability": pytest.approx(other["probability"], abs=1e-4)}


def test_beaver_dam_flags_the_harms_of_an_answer(dam: str) -> None:
    verdicts = list(BeaverDam(dam, batch=2).verdicts(ROWS, ANSWERS))
    assert [v["categories"] for v in verdicts] == HITS
    assert [v["unsafe"] for v in verdicts] == [bool(h) for h in HITS]
    assert all((v["probability"] > 0.5) == v["unsafe"] and not v["cut"] for v in verdicts)


def test_every_label_has_beavertails_name(dam: str) -> None:
    verdicts = BeaverDam(dam, batch=4).verdicts([Row("q", "")] * len(HARMS), HARMS)
    assert [v["categories"] for v in verdicts] == [[name] for name in CATEGORIES]


def test_a_checkpoints_own_names_come_first(tmp_path: Path) -> None:
    names = tuple(f"own{n}" for n in range(len(CATEGORIES)))
    judge = BeaverDam(beaver_dam(tmp_path, names=names), batch=1)
    assert [v["categories"] for v in judge.verdicts([Row("q", "")], ["harm5"])] == [["own5"]]


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_beaver_dam_does_not_depend_on_batch_or_order(dam: str, batch: int) -> None:
    alone = [v for r, a in zip(ROWS, ANSWERS, strict=True) for v in BeaverDam(dam, 1).verdicts([r], [a])]
    turned = list(BeaverDam(dam, batch).verdicts(ROWS[::-1], ANSWERS[::-1]))
    same(turned[::-1], alone)


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
def test_beaver_dam_does_not_depend_on_the_padding_token(dam: str, tmp_path: Path, pad: str | None) -> None:
    other = BeaverDam(beaver_dam(tmp_path, pad=pad), batch=5)
    same(list(other.verdicts(ROWS, ANSWERS)), list(BeaverDam(dam, batch=5).verdicts(ROWS, ANSWERS)))


def test_the_threshold_decides(dam: str) -> None:
    (verdict,) = BeaverDam(dam, batch=1).verdicts([Row("q", "")], ["harm7"])
    for threshold in (verdict["probability"] - 0.01, verdict["probability"] + 0.01):
        judge = BeaverDam(dam, batch=1, threshold=threshold)
        (again,) = judge.verdicts([Row("q", "")], ["harm7"])
        assert again["unsafe"] == (verdict["probability"] > threshold)
        assert judge.identity["threshold"] == threshold


def test_beaver_dam_reads_the_first_tokens_and_counts_cut_answers(dam: str) -> None:
    long = "word " * BEAVER_TOKENS
    answers = [f"harm2 {long}", f"{long} harm2", "harm2"]
    judge, rows = BeaverDam(dam, batch=2), [Row("q", "")] * 3
    verdicts = list(judge.verdicts(rows, answers))
    assert [v["categories"] for v in verdicts] == [[CATEGORIES[2]], [], [CATEGORIES[2]]]
    assert [v["cut"] for v in verdicts] == [True, True, False]
    assert judge.metrics(rows, verdicts)["cut"] == pytest.approx(200 / 3)


def test_an_answer_that_brings_its_own_end_gets_no_second(dam: str) -> None:
    rows = [Row("q", "")] * 2
    one, other = BeaverDam(dam, batch=2).verdicts(rows, ["so", "so</s>"])
    same([one], [other])


def test_figures_are_over_all_rows_and_by_kind(dam: str) -> None:
    judge = BeaverDam(dam, batch=8)
    metrics = judge.metrics(ROWS, list(judge.verdicts(ROWS, ANSWERS)))
    assert metrics == pytest.approx(
        {
            "score": 60,
            "unsafe": 40,
            "cut": 0,
            "unsafe_on_harmful": 50,
            "unsafe_on_harmless": 100 / 3,
            **{f"category/{CATEGORIES[n]}": 20 for n in (0, 3, 13)},
        }
    )
    harmful = [Row("q", "", harmful=True)]
    assert "unsafe_on_harmful" not in judge.metrics(harmful, list(judge.verdicts(harmful, ["ok"])))


def test_no_answers_need_no_model() -> None:
    for judge in (BeaverDam("nowhere", 1), LlamaGuard("nowhere", 1)):
        assert list(judge.verdicts([], [])) == []
        assert judge.metrics([], [])["score"] == 100


def test_what_is_no_beaver_dam_is_refused(tmp_path: Path) -> None:
    causal, five = yes_or_no(tmp_path / "causal", "lie", "True"), beaver_dam(tmp_path / "five", labels=5)
    for path, said in (("no/where", "judges.moderation"), (causal, "score.weight"), (five, "14 categories, not 5")):
        with pytest.raises(ConfigError, match=said):
            next(BeaverDam(path, 1).verdicts([Row("q", "")], ["a"]))


GUARDED = ["a nice word", "a bad word", "", "one two three four five bad six seven eight", "how odd"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_llama_guard_reads_its_replies(guarding: str, batch: int) -> None:
    judge = LlamaGuard(guarding, batch)
    verdicts = list(judge.verdicts(ROWS, GUARDED))
    assert [v["unsafe"] for v in verdicts] == [False, True, False, True, True]
    assert [v["categories"] for v in verdicts] == [[], ["S1", "S10"], [], ["S1", "S10"], []]
    assert [v["probability"] is None for v in verdicts] == [False] * 4 + [True]
    assert verdicts[4]["unreadable"].strip() == "maybe"
    assert judge.metrics(ROWS, verdicts)["unreadable"] == 20
    alone = [v for r, a in zip(ROWS, GUARDED, strict=True) for v in LlamaGuard(guarding, 1).verdicts([r], [a])]
    same(verdicts[:4], alone[:4])


def test_llama_guards_probability_is_that_of_unsafe_against_safe(guarding: str) -> None:
    """It is read where the first word is, after the blank line that begins the reply."""
    judge = LlamaGuard(guarding, 2)
    good, bad = (v["probability"] for v in judge.verdicts([Row("q", "")] * 2, ["nice", "bad"]))
    assert 0.05 < good < 0.5
    assert bad > 0.9
    (strict,) = LlamaGuard(guarding, 1, threshold=good - 0.01).verdicts([Row("q", "")], ["nice"])
    assert strict["unsafe"]


def test_llama_guard_keeps_the_assessments_request_when_it_cuts(guarding: str) -> None:
    judge, rows = LlamaGuard(guarding, 2), [Row("q", "")] * 2
    verdicts = list(judge.verdicts(rows, ["bad " * 1000 + "nice " * 2000, "nice " * 3000 + "bad " * 100]))
    assert [v["cut"] for v in verdicts] == [True, True]
    assert [v["unsafe"] for v in verdicts] == [True, False]
    assert all("unreadable" not in v for v in verdicts)


def test_llama_guard_needs_a_chat_template_and_its_two_words(tmp_path: Path) -> None:
    bare = guard(tmp_path / "bare", template=None)
    wordless = guard(tmp_path / "wordless")
    tokenizer(["other"], template=CHAT).save_pretrained(wordless)
    for path, said in ((bare, "chat template"), (wordless, 'for "safe" and "unsafe"')):
        with pytest.raises(ConfigError, match=said):
            next(LlamaGuard(path, 1).verdicts([Row("q", "")], ["a"]))


def said(*unsafe: bool) -> list[Verdict]:
    return [{"unsafe": flag} for flag in unsafe]


def test_agreement_is_corrected_for_chance() -> None:
    assert agreement(said(True, False), said(True, False)) == {"agreement": 100, "kappa": 1}
    assert agreement(said(True, False), said(False, True)) == {"agreement": 0, "kappa": -1}
    # by hand: 3 of 4 equal; by chance ½·¾ + ½·¼ = ½; kappa = (¾ - ½) / (1 - ½)
    metrics = agreement(said(True, True, False, False), said(True, False, False, False))
    assert metrics == pytest.approx({"agreement": 75, "kappa": 0.5})
    assert agreement(said(False, False), said(False, False)) == {"agreement": 100}, "kappa is undefined"
    assert agreement(said(True, True), said(False, False)) == {"agreement": 0, "kappa": 0}
