"""What the studies compute, on numbers small enough to check."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import encode, encode_prompts
from alignx_ds.data.rows import Row
from alignx_ds.routing.metrics import expected_calibration_error
from alignx_ds.study.calibration import calibrated, crossed, everywhere, halves, of_choice, reliability
from alignx_ds.study.contributions import query_types
from alignx_ds.study.drift import moved
from alignx_ds.study.forgetting import forgetting
from alignx_ds.study.record import finite
from alignx_ds.study.shots import Shots

POOL = [Row(f"what is {n} ?", f"it is {n} .") for n in range(30)]


def test_forgetting_is_the_best_before_the_end_less_the_end() -> None:
    assert forgetting([0.0, 90.0, 70.0, 40.0]) == 50.0
    assert forgetting([0.0, 10.0, 20.0, 90.0]) == -70.0, "what came last has gained"


def test_moved_is_in_units_of_the_spread_and_by_axis() -> None:
    before = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])  # each 3 from the centre
    after = before + np.array([[0.0, 6.0], [0.0, 0.0], [4.5, 0.0], [4.5, 0.0]])
    assert moved(before, after, ["a", "a", "b", "b"]) == pytest.approx({"a": 1.0, "b": 1.5})


@pytest.mark.parametrize("bins", [3, 15])
def test_the_reliability_diagram_s_mean_gap_is_the_ece(bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (500,), generator=generator)
    seen = reliability(logits.softmax(-1), labels, bins)
    assert sum(b["rows"] for b in seen) == 500
    gap = sum(b["rows"] / 500 * abs(b["confidence"] - b["accuracy"]) for b in seen)
    assert gap == pytest.approx(expected_calibration_error(logits.softmax(-1), labels, bins))


def test_a_temperature_mends_logits_that_are_too_sure() -> None:
    """Labels drawn from softmax(logits / 3): that temperature is found, and the error goes."""
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(8000, 3, generator=generator, dtype=torch.float64)
    labels = (logits / 3).softmax(-1).multinomial(1, generator=generator).squeeze(1)
    refitted = crossed(logits, labels, torch.arange(8000) % 2 == 0)
    found = calibrated(logits, labels, everywhere(labels, 1.0), refitted)
    assert found["temperatures"]["refitted"] == pytest.approx([3.0, 3.0], rel=0.1)
    assert found["ece"] > 0.1 > 0.03 > found["ece_t_refitted"]
    assert found["ece_t"] == found["ece"], "its own temperature is the one that was given"
    assert found["brier_refitted"] < found["brier_none"]


def test_no_row_has_a_part_in_its_own_temperature() -> None:
    """One half is always right, so it would be made surer; the other always wrong, so it would be made unsure."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4, dtype=torch.float64)
    right = torch.tensor([True, False] * 4)
    made = crossed(logits, torch.zeros(8, dtype=torch.long), right)
    assert made[right].min() > 10 > 0.1 > made[~right].max()


def test_halves_are_of_questions_whatever_their_order() -> None:
    asked = [("honest", row) for row in POOL]
    first = halves(asked)
    assert int(first.sum()) == 15
    assert torch.equal(halves(asked[::-1]), first.flip(0))


def test_choices_need_a_best_answer_and_a_wrong_one() -> None:
    whole = Row("q", "yes", incorrect=("no",))
    others = [Row("q", "", incorrect=("no",)), Row("q", "yes")]
    assert of_choice([("honest", row) for row in (whole, *others)]) == [("honest", whole)]


def test_queries_are_named_by_harm_and_otherwise_by_category() -> None:
    rare = [("honest", Row("q", "a", category=f"rare{n}")) for n in range(6)]
    owned = [
        ("generalist", Row("hello", "hello")),
        ("harmless", Row("how to hurt ?", "no", harmful=True, category="violence")),
        ("harmless", Row("how to bake ?", "so", category="")),
        *[("honest", Row("q", "a", category="colour"))] * 3,
        *rare,
    ]
    kinds = query_types(owned)
    assert kinds[:4] == ["generalist", "harmless: harmful", "harmless: benign", "honest: colour"]
    assert set(kinds[6:]) == {*(f"honest: rare{n}" for n in range(5)), "honest: other"}


def shots(tokenizer: PreTrainedTokenizerBase, limit: int = 256) -> Shots:
    return Shots(tokenizer, 0, limit, {"honest": POOL})


def test_examples_are_the_same_again_grow_by_adding_and_never_give_the_answer(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    drawer = shots(world_tokenizer)
    for row in POOL:
        one, three = (drawer.examples("honest", row, count) for count in (1, 3))
        assert len(three) == 3 and three[:1] == one == drawer.examples("honest", row, 1)
        assert row not in three
    assert drawer.examples("honest", POOL[0], 0) == []


def test_without_examples_a_prompt_is_the_one_that_the_model_was_trained_on(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = Row("is the frob red ?", "the frob is blue .")
    (example,) = shots(world_tokenizer).encoded(row, [], [row.response])
    assert example == encode([row], world_tokenizer)[0]
    (prompt,) = shots(world_tokenizer).encoded(row, [], [])
    assert list(prompt.ids) == encode_prompts([row.prompt], world_tokenizer)[0]


def test_examples_stand_before_the_question_and_fewer_of_them_where_there_is_no_room(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row, before = Row("is the frob red ?", "the frob is blue ."), POOL[:3]
    (whole,) = shots(world_tokenizer).encoded(row, before, [row.response])
    tail = encode([row], world_tokenizer)[0]
    assert whole.ids[whole.prompt_length :] == tail.ids[tail.prompt_length :]
    text = world_tokenizer.decode(whole.ids)
    assert text.count("<assistant>") == 4 and text.count(world_tokenizer.bos_token or "") == 1
    (cut,) = shots(world_tokenizer, limit=len(whole.ids) - 1).encoded(row, before, [row.response])
    assert world_tokenizer.decode(cut.ids).count("<assistant>") == 3


def test_what_is_no_number_is_null_in_the_record() -> None:
    assert json.dumps(finite({"a": [float("inf"), 1.5], 3: float("nan")})) == '{"a": [null, 1.5], "3": null}'
