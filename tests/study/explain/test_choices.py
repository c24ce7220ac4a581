"""Decisions: the numbers are the gates' own, and a word contributes what the score loses without it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from constructed_runs import LAYERS, PROMPTS

from alignx_ds.data.encode import Example, LabelledExamples, encode_prompts, pad_token
from alignx_ds.mocae.gate import TERMS
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.lexical import ngrams
from alignx_ds.models.finished import aligned_of, tokenizer_of
from alignx_ds.routing.gate_terms import gate_terms
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.study.explain.choices import MOST_WORDS, choices


def test_the_numbers_are_those_of_the_gates(run: FinishedRun) -> None:
    """Computed as when the temperature was fitted: in batches, with right padding, by another code path."""
    model, names = aligned_of(run), run.experts
    examples = [Example(tuple(ids), len(ids)) for ids in encode_prompts(PROMPTS, tokenizer_of(run))]
    terms = gate_terms(model, LabelledExamples(examples, [0] * len(PROMPTS)), pad_token(tokenizer_of(run)), 2)
    gates = gates_of(model)
    for number, prompt in enumerate(PROMPTS):
        explained = choices(model, tokenizer_of(run), prompt)
        assert [choice.layer for choice in explained] == list(gates)
        for choice in explained:
            temperature = float(gates[choice.layer].calibration_temperature)
            assert choice.temperature == temperature != 1
            known = {t: terms[choice.layer][t][number] for t in TERMS}
            logits = torch.stack(list(known.values())).sum(0) / temperature
            sure = logits.softmax(-1)
            for candidate in choice.candidates:
                e = names.index(candidate.name)
                expected = {t: float(part[e]) for t, part in known.items()}
                assert candidate.parts == pytest.approx(expected, rel=1e-3, abs=1e-4)
                assert candidate.logit == pytest.approx(float(logits[e]), rel=1e-3, abs=1e-3)
                assert candidate.confidence == pytest.approx(float(sure[e]), abs=1e-3)
                assert candidate.gate == (candidate is choice.chosen)
            assert choice.chosen.name == names[int(logits.argmax())]
            assert sorted([*choice.never, *(c.name for c in choice.candidates)]) == sorted(names)
            confidences = [c.confidence for c in choice.candidates]
            assert confidences == sorted(confidences, reverse=True)


def test_a_shared_gate_decides_for_all_layers_and_another_for_its_own(made: dict[str, Path]) -> None:
    for scope, expected in (("shared", [(3, LAYERS)]), ("per_layer", [(3, [3]), (4, [4])])):
        run = FinishedRun.open(made[scope])
        found = choices(aligned_of(run), tokenizer_of(run), PROMPTS[0])
        assert [(choice.layer, choice.layers) for choice in found] == expected
        assert {choice.never == ["generalist"] for choice in found} == {scope == "per_layer"}


def test_a_word_contributes_what_the_score_loses_without_it(run: FinishedRun) -> None:
    """With a token's weights at zero its own contribution is gone, and no other changes."""
    model, names = aligned_of(run), run.experts
    ids = torch.tensor(encode_prompts(PROMPTS[2:], tokenizer_of(run)))
    choice = choices(model, tokenizer_of(run), PROMPTS[2])[0]
    mask, weight = model.routing.query_mask, run.config.gate.lexical
    assert choice.runner_up is not None
    chosen, other = names.index(choice.chosen.name), names.index(choice.runner_up.name)

    def margin() -> float:
        scores = model.lexicon(ids, mask)[0]
        return weight * float(scores[chosen] - scores[other])

    whole, kept = margin(), model.lexicon.weights.clone()
    assert whole == pytest.approx(choice.margins()["lexical"], abs=1e-4)
    buckets = ngrams(ids, mask)[0][0].tolist()
    pieces = [[i] for i in ids[0].tolist()] + [list(pair) for pair in pairwise(ids[0].tolist())]
    texts = [tokenizer_of(run).decode(piece) for piece in pieces]
    assert len(choice.words) == MOST_WORDS
    for word in choice.words:
        model.lexicon.weights[:, buckets[texts.index(word.text)]] = 0.0
        assert whole - margin() == pytest.approx(word.pull, abs=1e-4), word.text
        model.lexicon.weights.copy_(kept)
    assert sum(w.pull for w in choice.words) + choice.other_words == pytest.approx(whole, abs=1e-4)
    pulls = [abs(word.pull) for word in choice.words]
    assert pulls == sorted(pulls, reverse=True)
