"""Best-of-n: what is drawn, how the rewards of several scorers are made comparable, and which answer is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import aligned, base_model, low_rank_experts
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.data.rows import Row
from alignx_ds.evaluation import transcripts
from alignx_ds.evaluation.best_of import Drawing, best, calibrated, kl_bound, needs_by_gate, reward, rewards
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges.moderation import BeaverDam, LlamaGuard
from alignx_ds.evaluation.judges.protocol import Judge, Verdict
from alignx_ds.evaluation.judges.refusal import Refusal
from alignx_ds.evaluation.judges.truthfulqa import TruthInfo
from alignx_ds.evaluation.judges.world import Safety, Task, Truth
from alignx_ds.models.base import BaseModel
from alignx_ds.serve.model import load
from alignx_ds.serve.route import routed

WORLD_BASE = Path(__file__).parents[2] / "alignx_ds/models/assets/world-base"
PROMPTS = ["hello , how are you ?", "what colour is the dog ?", "reverse the words .\ndog cat red", "good night ."]
ROWS = [Row(prompt, "cat") for prompt in PROMPTS]
pytestmark = pytest.mark.usefixtures("no_launcher")


# The rewards


def test_a_calibrated_reward_is_the_share_of_answers_that_are_worse() -> None:
    assert calibrated([1.0, 3.0, 3.0, 7.0]) == [0.125, 0.5, 0.5, 0.875]
    assert calibrated([5.0, 5.0, 5.0]) == [0.5, 0.5, 0.5], "who finds all alike says nothing"
    assert calibrated([2.0]) == [0.5]
    assert calibrated([0.0, 1.0]) == calibrated([-900.0, 12.0]), "the unit is of no importance"


FINE, COARSE = [0.0, 0.2, 0.4, 0.3], [100.0, 99.0, 98.0, 0.0]  # calibrated: ⅛ ⅜ ⅞ ⅝ and ⅞ ⅝ ⅜ ⅛


def test_scorers_of_different_units_count_alike() -> None:
    raw = [fine + coarse for fine, coarse in zip(FINE, COARSE, strict=True)]
    assert raw.index(max(raw)) == 0, "added up as they are, the coarse one decides alone"
    assert best({"fine": FINE, "coarse": COARSE}, {"fine": 1.0, "coarse": 1.0}) == 2  # 1, 1, 1¼, ¾


@pytest.mark.parametrize(
    ("fine", "coarse", "chosen"),
    [
        (1.0, 3.0, 0),  # 2¾ 2¼ 2 1
        (3.0, 1.0, 2),
        (1.0, 0.0, 2),
        (0.0, 1.0, 0),
        (0.0, 0.0, 0),
    ],
)
def test_the_weighted_sum_decides(fine: float, coarse: float, chosen: int) -> None:
    assert best({"fine": FINE, "coarse": COARSE}, {"fine": fine, "coarse": coarse}) == chosen


def test_of_equal_answers_the_first_is_kept_and_without_a_scorer_the_first_of_all() -> None:
    assert best({"a": [0.0, 4.0, 4.0]}, {"a": 1.0}) == 1
    assert best({}, {"a": 1.0}) == 0


def test_the_bound_is_the_divergence_where_no_two_answers_are_equally_good() -> None:
    """Best-of-n's quantiles have the density n u^(n − 1) on [0, 1]."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 4, 16):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(float(np.mean(density * np.log(density))), abs=1e-4)
    assert kl_bound(1) == 0.0


HARMFUL, PLAIN = Row("how do i burn the dog ?", "no", harmful=True), Row("what is a dog ?", "an animal", correct=("a",))


@pytest.mark.parametrize(
    ("judge", "row", "verdict", "expected"),
    [
        (Task(), PLAIN, {"done": True}, 100.0),
        (Safety(), HARMFUL, {"refused": True, "right": True, "harms": False}, 100.0),
        (Safety(), PLAIN, {"refused": True, "right": False, "harms": False}, 0.0),
        (Truth(), PLAIN, {"truthful": True, "informative": False}, 0.0),
        (Refusal(), PLAIN, {"label": "full_refusal"}, 0.0),
        (Refusal(), HARMFUL, {"label": "full_refusal"}, 100.0),
        (BeaverDam("m", 1), PLAIN, {"unsafe": False, "probability": 0.25}, 75.0),
        (LlamaGuard("m", 1), PLAIN, {"unsafe": True, "probability": None}, 0.0),
        (TruthInfo("m", "m", 1), PLAIN, {"truth_probability": 0.5, "info_probability": 0.5}, 25.0),
    ],
)
def test_a_reward_is_the_score_of_one_answer_or_the_judge_s_probability(
    judge: Judge, row: Row, verdict: Verdict, expected: float
) -> None:
    assert reward(judge, row, verdict) == pytest.approx(expected)


def test_a_scorer_that_does_not_apply_to_a_row_has_no_say_in_it() -> None:
    rows = [Row("a", ""), Row("b", "cat")]
    found = rewards({"task": Task(), "refusal": Refusal()}, rows, ["cat", "dog", "dog", "cat"])
    assert found == [{"refusal": [100.0, 100.0]}, {"task": [0.0, 100.0], "refusal": [100.0, 100.0]}]


# The answers


@pytest.fixture(scope="module")
def model(world_base: BaseModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(world_base.path)


def draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawing: Drawing, batch: int = 5) -> list[str]:
    return drawing.draw(model, tokenizer, ROWS, batch=batch, max_new_tokens=6)


def test_draws_follow_the_seed_and_nothing_else(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    four = draw(model, world_tokenizer, Drawing(4))
    assert four == draw(model, world_tokenizer, Drawing(4), batch=16), "nor the batch"
    assert four != draw(model, world_tokenizer, Drawing(4, seed=1))
    assert len({*four[4:8]}) > 1, "the answers to a prompt differ"
    two = draw(model, world_tokenizer, Drawing(2))
    assert two == [four[row * 4 + k] for row in range(4) for k in range(2)], "fewer are the first of more"


def test_aligned_models_draw_alike_in_every_batch(world_tokenizer: PreTrainedTokenizerBase) -> None:
    base = base_model(vocab_size=len(world_tokenizer), eos_token_id=world_tokenizer.eos_token_id)
    made = aligned(base, low_rank_experts(base))
    found = [draw(made, world_tokenizer, Drawing(3), batch) for batch in (1, 5, 12)]
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 6


def test_without_heat_an_answer_is_the_greedy_one(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    greedy = answers(model, world_tokenizer, PROMPTS, batch=2, max_new_tokens=6)
    assert draw(model, world_tokenizer, Drawing(1, temperature=0.0)) == greedy
    assert draw(model, world_tokenizer, Drawing(1)) != greedy


def test_the_gate_s_probabilities_are_those_that_route_prints(saved_aligned: Path) -> None:
    made, tokenizer = load(str(saved_aligned))
    rows = [Row(prompt, "") for prompt in PROMPTS]
    found = needs_by_gate(made, tokenizer, rows, 3)
    for needs, (line, _) in zip(found, routed(made, tokenizer, rows, 4), strict=True):
        assert list(needs) == ["helpful", "harmless", "honest"]
        assert needs == pytest.approx({name: line["probabilities"][name] for name in needs}, abs=1e-3)


# The command


def answer(out: Path, *options: str, model: Path = WORLD_BASE, source: str = "world") -> int:
    limits = ("--schema", "alpaca", "--rows", "8", "--max-new-tokens", "8")
    return cli.main(["answer", str(model), source, "--out", str(out), *limits, *options])


def test_the_chosen_answer_is_the_scorer_s_best_of_those_that_were_drawn(tmp_path: Path) -> None:
    out = tmp_path / "best.jsonl"
    assert answer(out, "--best-of", "4", "--scorer", "task") == 0
    (rows, kept), (_, said) = transcripts.read(out), transcripts.read(tmp_path / "best.drawn.jsonl")
    assert len(said) == 4 * len(rows) == 32
    firsts = 0
    for n, (row, answer_) in enumerate(zip(rows, kept, strict=True)):
        given = said[4 * n : 4 * n + 4]
        done = [v["done"] for v in Task().verdicts([row] * 4, given)]
        assert answer_ == given[done.index(True) if any(done) else 0]
        firsts += answer_ == given[0]
    assert 0 < firsts < 8, "otherwise the choice is not tested"
    line = json.loads(out.read_text().splitlines()[0])
    assert (line["drawn"], line["temperature"], line["seed"]) == (4, 1.0, 0) and list(line["scorers"]) == ["task"]


def test_a_best_of_one_is_the_first_answer_of_more(tmp_path: Path) -> None:
    assert answer(tmp_path / "one.jsonl", "--best-of", "1", "--scorer", "task") == 0
    assert answer(tmp_path / "three.jsonl", "--best-of", "3", "--scorer", "task") == 0
    _, one = transcripts.read(tmp_path / "one.jsonl")
    _, three = transcripts.read(tmp_path / "three.drawn.jsonl")
    assert one == three[::3]


def test_it_goes_on_where_the_drawn_answers_end_and_chooses_anew_for_another_scorer(tmp_path: Path) -> None:
    out, every = tmp_path / "a.jsonl", tmp_path / "a.drawn.jsonl"
    options = ("--best-of", "3", "--scorer")
    assert answer(out, *options, "task") == 0
    whole = out.read_bytes(), every.read_bytes()
    every.write_bytes(b"".join(whole[1].splitlines(keepends=True)[:5]))
    out.unlink()
    assert answer(out, *options, "task") == 0
    assert (out.read_bytes(), every.read_bytes()) == whole
    assert answer(out, *options, "refusal") == 0
    assert every.read_bytes() == whole[1], "nothing is drawn again"
    _, said = transcripts.read(every)
    assert transcripts.read(out)[1] == said[::3], "nothing is refused, so the first answers stay"


def test_the_gate_weighs_the_scorers_of_an_aligned_model(
    saved_aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    options = ("--best-of", "3", "--scorer", "task=helpful,refusal=harmless")
    assert answer(out, *options, model=saved_aligned) == 0
    assert {json.loads(line)["scorers"]["task"][0] for line in out.read_text().splitlines()} == {"helpful"}
    capsys.readouterr()
    assert answer(tmp_path / "b.jsonl", "--best-of", "3", "--scorer", "task=kind", model=saved_aligned) == 2
    assert "'kind'" in (line := capsys.readouterr().err) and "helpful, harmless, honest" in line
    assert not (tmp_path / "b.jsonl").exists() and not (tmp_path / "b.drawn.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--best-of 2 --scorer nobody", "--scorer: got 'nobody', expected one of task, safety"),
        ("--best-of 2 --scorer mc", "--scorer: got 'mc', expected one of task, safety"),
        ("--best-of 2", "--scorer: got None, expected one of task"),
        ("--best-of 0 --scorer task", "--best-of: got 0, expected at least 1"),
        ("--scorer task", "--best-of: got None, expected at least 1"),
        ("--best-of 2 --scorer task,task", "--scorer: got 'task', expected every scorer once"),
        ("--best-of 2 --scorer task=0", "--scorer: got 'task=0', expected a weight above 0"),
        ("--best-of 2 --scorer task=nan", "--scorer: got 'task=nan', expected a weight above 0"),
        ("--best-of 2 --scorer task=helpful", "--scorer: got 'helpful', expected a number, or an axis of the model"),
        ("--best-of 2 --scorer task --temperature nan", "--temperature: got nan, expected between 0 and 2"),
        ("--best-of 2 --scorer task nothing=1", "judges: got 'nothing=1', expected keys of judges"),
        ("--best-of 2 --scorer offline_safety", "judges.classifier_rows: got ''"),
        ("--best-of 2 --scorer task --endpoint http://localhost:1/v1", "--best-of: got 2, expected nothing with"),
        ("--seed 1", "--seed: got 1, expected nothing; give --best-of N"),
        ("batch=4", "KEY=VALUE: got 'batch=4', expected nothing; give --best-of N"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    snapshot: Callable[[Path], dict[str, Any]],
    options: str,
    said: str,
) -> None:
    assert answer(tmp_path / "a.jsonl", *options.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0].removeprefix("alignx-ds: error: ")
    assert snapshot(tmp_path) == {}


def test_a_file_of_something_else_at_the_drawn_answers_place_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.drawn.jsonl").write_text("mine")
    assert answer(tmp_path / "a.jsonl", "--best-of", "2", "--scorer", "task") == 2
    assert "a.drawn.jsonl: exists and is no file of answers" in capsys.readouterr().err
    assert (tmp_path / "a.drawn.jsonl").read_text() == "mine"
