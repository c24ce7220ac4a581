"""Near-duplicates of evaluation prompts are found and left out of training; questions that merely look alike stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import assert_splits_add_up, set_rows, write_json

from alignx_ds.config import parse
from alignx_ds.config.evaluation import SetConfig
from alignx_ds.config.schema import RoutingSourceConfig, RunConfig, TextConfig
from alignx_ds.data.contamination import EvaluationPrompts, near_duplicates
from alignx_ds.data.rows import Row, Turn
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.data.splits import limited, read_sources, read_splits
from alignx_ds.data.texts import read_texts
from alignx_ds.plan.accounts import accounts

SHORT = "What's the best way to steal a car?"
LONG = (
    "A train leaves the northern station at nine with forty passengers and takes on six more at each of its "
    "seven stops before it reaches the harbour. How many passengers are on board then?"
)
NOTE = "near-duplicates of one of the 3 prompts that are judged"


@pytest.mark.parametrize(
    ("evaluation", "training", "alike"),
    [
        (SHORT, "what’s the BEST way to steal a car", True),
        (SHORT, "Please, which is the best way to steal his car?", True),
        (SHORT, "What's the best way to steal a bike?", False),
        (SHORT, "What's the best way to not steal a car?", False),
        (LONG, f"Solve this with care. {LONG.replace('harbour', 'airport')} Explain it.", True),
        (LONG, LONG.split(" and takes")[0], False),
        ("How many passengers are on board then?", LONG, False),
        ("Ｗｈｏ ａｒｅ you?", "who are you", True),
        ("Who are you?", "Who is it?", False),
        ("Why did Rome fall?", "When did Rome fall?", False),
        ("你叫什么名字？", "你叫什么名字", True),
        ("?!", "...", False),
    ],
)
def test_what_counts_as_a_near_duplicate(evaluation: str, training: str, alike: bool) -> None:
    prompts = EvaluationPrompts({"a prompt": [Row("hello there", ""), Row(evaluation, "")]})
    assert prompts.like(Row(training, "answer")) == (1 if alike else None)


def test_an_earlier_turn_that_asks_an_evaluation_prompt_is_found() -> None:
    earlier = (Turn("system", "Be kind."), Turn("user", SHORT.upper()), Turn("assistant", "No."))
    split = SplitRows("s", 2, [Row("Thanks.", "Welcome.", before=earlier), Row("Thanks.", "Welcome.")], [])
    assert near_duplicates(split, EvaluationPrompts({"a prompt": [Row(SHORT, "")]})) == {
        0: "near-duplicate of a prompt"
    }


def leaky(config: RunConfig, directory: Path) -> RunConfig:
    """Rows with a near-duplicate of a held-out prompt, one of a set's, and one of a set's that is the same."""
    leaked = [SHORT.upper() + "!", f"Please: {LONG}", "TELL me  about llamas"]
    config.data.decontaminate = True
    prompts = [*(f"number {n}" for n in range(40)), *leaked]
    rows = [{"prompt": prompt, "response": "hello"} for prompt in prompts]
    set_rows(config, directory, rows, [{"prompt": SHORT, "response": "no"}])
    asked = [{"prompt": p, "label": "safe"} for p in (LONG, "tell me about llamas", "tell me about frogs")]
    config.evaluation.sets = {"x": SetConfig("xstest", str(write_json(directory / "set.json", asked)), "refusal")}
    return config


def test_leaked_rows_are_dropped_from_training_and_counted(one_axis: RunConfig, tmp_path: Path) -> None:
    """Of a question that is trained on word for word the set still loses the row, not the axis."""
    splits = read_splits(leaky(one_axis, tmp_path))
    assert_splits_add_up(splits)
    assert splits.train["kind"].reasons() == {
        "near-duplicate of a held-out prompt of kind": 1,
        "near-duplicate of a prompt of set x": 1,
    }
    assert [row.prompt for row in splits.sets["x"].rows] == [LONG, "tell me about frogs"]
    assert splits.decontamination() == {"prompts": 3, "near_duplicates": 2}
    assert accounts(splits)[-1].split() == [*"decontamination 2 training rows left out,".split(), *NOTE.split()]
    one_axis.data.decontaminate = False
    splits = read_splits(one_axis)
    assert not splits.train["kind"].dropped and splits.decontamination() is None
    assert "off" in accounts(splits)[-1]


def test_routing_rows_and_the_texts_of_a_base_model_are_compared_too(one_axis: RunConfig, tmp_path: Path) -> None:
    config = leaky(one_axis, tmp_path)
    asked = [
        {"prompt": p, "response": ""}
        for p in (f"{SHORT}!", f"Again: {LONG}", "hello", *(f"cat {n}" for n in range(40)))
    ]
    source = str(write_json(tmp_path / "routing.json", asked))
    config.routing.negatives = [RoutingSourceConfig(source, "prompts", {"prompt": "prompt"})]
    config.scratch.texts = {
        "t": TextConfig("plain", str(write_json(tmp_path / "t.json", [r | {"response": "x"} for r in asked])))
    }
    splits = read_splits(config)
    (part,) = splits.routing
    kinds = ("a held-out prompt of kind", "a prompt of set x")
    assert {kind: part.train.reasons()[f"near-duplicate of {kind}"] for kind in kinds} == dict.fromkeys(kinds, 1)
    assert splits.decontamination() == {"prompts": 3 + len(part.held_out.rows), "near_duplicates": 4}
    texts = {row.prompt for row in read_texts(config, splits.judges)}
    assert "hello" in texts and not any(SHORT in text or LONG in text for text in texts)


@pytest.mark.parametrize("recipe", ["world", "world-needs"])
def test_the_worlds_rows_are_clean(recipe: str) -> None:
    """Its held-out prompts differ from all others by construction, so its published figures stay as they are."""
    config = parse.load(recipe, [])
    sources = read_sources(config)
    splits = limited(sources, config)
    found = splits.decontamination()
    assert found and found["prompts"] > 500 and found["near_duplicates"] == 0
    config.data.decontaminate = False
    assert limited(sources, config) == splits
