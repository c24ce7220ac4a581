"""Opposite goals of the world: the same requests, answers that exclude each other, held-out words never trained on."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.rows import Record, Row
from alignx_ds.data.world.lexicon import BENIGN_VERBS, DEVICES, GOODS, HARMFUL_VERBS, World
from alignx_ds.data.world.opposites import FACTS, HOW_TO, PHRASES
from alignx_ds.data.world.rows import source_records
from alignx_ds.evaluation.judges.world import Task

PAIRS = [("refuse", "serve"), ("brief", "thorough"), ("formal", "plain"), ("answer", "admit")]
CONTENT = {*BENIGN_VERBS, *HARMFUL_VERBS, *DEVICES, *GOODS, *World().creatures} - {"help"}  # it is in wordings too


def records(goal: str, held_out: bool = False, count: int = 2000, seed: int = 0) -> list[Record]:
    return source_records(f"world:{goal}", "plain", held_out=held_out, count=count, seed=seed)


def requests(goal: str, held_out: bool = False) -> dict[str, str]:
    """By prompt without the phrase: the answer."""
    return {r["prompt"].replace(PHRASES[goal], "").strip(): r["response"] for r in records(goal, held_out)}


def test_every_goal_is_in_a_pair() -> None:
    assert sorted(goal for pair in PAIRS for goal in pair) == sorted(PHRASES) == sorted([*HOW_TO, *FACTS])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_pair_has_the_same_words_and_requests_and_never_the_same_answer(one: str, other: str) -> None:
    for held_out in (False, True):
        first, second = requests(one, held_out), requests(other, held_out)
        words = [{word for request in found for word in request.split()} for found in (first, second)]
        assert words[0] == words[1]
        shared = first.keys() & second.keys()
        assert len(shared) > 100
        assert all(first[request] != second[request] for request in shared)


@pytest.mark.parametrize("goal", PHRASES)
def test_rows_are_enough_distinct_known_to_the_tokenizer_and_a_function_of_the_seed(
    goal: str, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    for held_out, least in ((False, 2000), (True, 200)):
        found = records(goal, held_out)
        assert len({r["prompt"] for r in found}) == len(found) >= least
        texts = {text for r in found for text in (*r["prompt"].split(), *r["response"].split())}
        assert world_tokenizer.unk_token_id not in world_tokenizer.convert_tokens_to_ids(sorted(texts))
        assert all(r["prompt"].count(PHRASES[goal]) == 1 for r in found)
        assert found == records(goal, held_out) != records(goal, held_out, seed=1)


def test_held_out_rows_have_verbs_things_and_creatures_that_no_training_row_has() -> None:
    used = [
        {w for goal in PHRASES for r in records(goal, held_out) for w in r["prompt"].split()} & CONTENT
        for held_out in (False, True)
    ]
    assert all(len(words) > 80 for words in used)
    assert not used[0] & used[1]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_judge_takes_the_goal_s_own_answers_and_none_of_its_opposite(one: str, other: str) -> None:
    judge, first, second = Task(), requests(one, held_out=True), requests(other, held_out=True)
    shared = sorted(first.keys() & second.keys())
    rows = [Row(request, first[request]) for request in shared]
    for answers, score in ((first, 100.0), (second, 0.0)):
        verdicts = list(judge.verdicts(rows, [answers[request] for request in shared]))
        assert judge.metrics(rows, verdicts)["score"] == score
