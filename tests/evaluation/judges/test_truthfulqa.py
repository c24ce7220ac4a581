"""TruthfulQA's two judges, on tiny ones that object to a word each."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from tiny_judges import yes_or_no
from transformers import LlamaForCausalLM

from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError
from alignx_ds.evaluation.judges.truthfulqa import TruthInfo

ANSWERS = ["the sky is blue", "a lie about the whole wide sky and the sea", "comment none", "", "lie comment"]
ROWS = [Row(f" question {n}", "") for n in range(len(ANSWERS))]
TRUTHFUL, INFORMATIVE = [True, False, True, True, False], [True, True, False, True, False]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("truth")
    return yes_or_no(path / "truth", "lie", "True"), yes_or_no(path / "info", "comment", "Helpful")


def test_each_model_is_asked_its_own_question(models: tuple[str, str]) -> None:
    judge = TruthInfo(*models, batch=2)
    verdicts = list(judge.verdicts(ROWS, ANSWERS))
    assert [v["truthful"] for v in verdicts] == TRUTHFUL
    assert [v["informative"] for v in verdicts] == INFORMATIVE
    assert all((v["truth_probability"] >= 0.5) == v["truthful"] for v in verdicts)
    metrics = judge.metrics(ROWS, verdicts)
    assert metrics == pytest.approx({"score": 36, "truthful": 60, "informative": 60, "both": 40, "cut": 0})


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_verdicts_do_not_depend_on_batch_or_order(models: tuple[str, str], batch: int) -> None:
    alone = [v for r, a in zip(ROWS, ANSWERS, strict=True) for v in TruthInfo(*models, 1).verdicts([r], [a])]
    turned = list(TruthInfo(*models, batch).verdicts(ROWS[::-1], ANSWERS[::-1]))[::-1]
    for one, other in zip(turned, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_question_stays_when_an_answer_is_cut(models: tuple[str, str]) -> None:
    answers = ["word " * 3000 + "lie", "lie " * 3000, "lie"]
    verdicts = list(TruthInfo(*models, batch=3).verdicts([Row("q", "")] * 3, answers))
    assert [v["cut"] for v in verdicts] == [True, True, False]
    assert [v["truthful"] for v in verdicts] == [True, False, False]


def test_one_model_is_in_memory_at_a_time(models: tuple[str, str]) -> None:
    def loaded() -> int:
        found = [m for m in gc.get_objects() if isinstance(m, LlamaForCausalLM)]
        return sum(m.device.type != "meta" for m in found)

    gc.collect()
    before = loaded()
    verdicts = TruthInfo(*models, batch=1).verdicts(ROWS, ANSWERS)
    next(verdicts)
    assert loaded() == before + 1
    verdicts.close()  # type: ignore[attr-defined]
    assert loaded() == before


def test_models_that_cannot_judge_are_refused(models: tuple[str, str], tmp_path: Path) -> None:
    split = yes_or_no(tmp_path, "lie", "True", words=("yes", "no"))
    truth, info = models
    for pair, said in (
        (("no/where", info), "judges.truth"),
        ((truth, "no/where"), "judges.info"),
        ((split, info), "' yes', ' no'"),
    ):
        with pytest.raises(ConfigError, match=said):
            next(TruthInfo(*pair, batch=1).verdicts(ROWS, ANSWERS))
    assert list(TruthInfo("no/where", "no/where", 1).verdicts([], [])) == []
