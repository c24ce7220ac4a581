"""The fitted lexicon computes what scikit-learn's TF-IDF and logistic regression compute from the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from tiny_models import generator

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.mocae.lexical import Lexicon, bucket_counts
from alignx_ds.routing.fit_lexicon import INVERSE_REGULARISATION, fit_lexicon

TOPICS = {0: range(0, 30), 2: range(20, 50), 3: range(40, 70)}  # tokens that an expert's prompts are made of


def rows_of(experts: list[int], count: int, seed: int) -> LabelledExamples:
    source, made = generator(seed), LabelledExamples([], [])
    for expert in experts:
        for _ in range(count):
            topic = torch.tensor(list(TOPICS[expert]))
            length = int(torch.randint(4, 12, (1,), generator=source))
            prompt = topic[torch.randint(0, len(topic), (length,), generator=source)].tolist()
            answer = [99] * int(torch.randint(1, 5, (1,), generator=source))
            made.add([Example(ids=[*prompt, *answer], prompt_length=length)], expert)
    return made


def scores(lexicon: Lexicon, rows: LabelledExamples) -> torch.Tensor:
    prompts = [torch.tensor([e.ids[: e.prompt_length]]) for e in rows.examples]
    return torch.cat([lexicon(ids, torch.ones_like(ids)) for ids in prompts])


def fitted(experts: list[int], kept: list[int] | None = None) -> tuple[Lexicon, LabelledExamples, LabelledExamples]:
    known, calibration_rows = rows_of(experts, 40, 1), rows_of(kept or experts, 20, 2)
    lexicon = Lexicon(4)
    lexicon.load_state_dict(fit_lexicon(known, calibration_rows, 4))
    return lexicon, known, calibration_rows


@pytest.mark.parametrize("experts", [[0, 2, 3], [0, 3]])
def test_the_scores_are_those_of_scikit_learn_but_for_their_scale(experts: list[int]) -> None:
    lexicon, known, calibration_rows = fitted(experts)
    counts = [
        sparse.vstack(
            [
                sparse.csr_matrix(bucket_counts(ids, torch.ones_like(ids)).numpy())
                for e in rows.examples
                for ids in [torch.tensor([e.ids[: e.prompt_length]])]
            ]
        )
        for rows in (known, calibration_rows)
    ]
    weighing = TfidfTransformer(sublinear_tf=True).fit(counts[0])
    router = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000).fit(
        weighing.transform(counts[0]), known.experts
    )
    expected = router.predict_log_proba(weighing.transform(counts[1]))
    found = scores(lexicon, calibration_rows)[:, experts]
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-3)
    differences, wanted = found[:, :1] - found[:, 1:], expected[:, :1] - expected[:, 1:]
    scale = wanted.std() / float(differences.std(correction=0))
    np.testing.assert_allclose(differences.numpy() * scale, wanted, rtol=2e-2, atol=2e-3)


def test_unseen_prompts_are_classified() -> None:
    lexicon, _, _ = fitted([0, 2, 3])
    asked = rows_of([0, 2, 3], 50, 3)
    best = torch.tensor([0, 2, 3])[scores(lexicon, asked)[:, [0, 2, 3]].argmax(-1)]
    assert float((best == torch.tensor(asked.experts)).float().mean()) > 0.9


def test_answers_are_ignored() -> None:
    known, calibration_rows = rows_of([0, 2, 3], 40, 1), rows_of([0, 2, 3], 20, 2)
    prompts = [
        LabelledExamples([Example(e.ids[: e.prompt_length], e.prompt_length) for e in r.examples], r.experts)
        for r in (known, calibration_rows)
    ]
    for name, tensor in fit_lexicon(known, calibration_rows, 4).items():
        assert torch.equal(tensor, fit_lexicon(prompts[0], prompts[1], 4)[name]), name


def test_with_a_single_expert_all_scores_are_zero() -> None:
    lexicon, _, calibration_rows = fitted([2])
    assert not scores(lexicon, calibration_rows).any()


def test_the_calibration_split_may_lack_an_expert() -> None:
    lexicon, _, calibration_rows = fitted([0, 2, 3], [0, 2])
    assert torch.isfinite(scores(lexicon, calibration_rows)).all()


def test_a_prompt_of_two_needs_counts_for_both() -> None:
    """Prompts of both topics have the scores of both experts far above the third's."""
    known, calibration_rows = rows_of([0, 2, 3], 40, 1), rows_of([0, 2, 3], 20, 2)
    far = [Example((*range(75, 85), 99), 10)] * 30  # words that no other prompt has
    known.add(far, 2, [(2, 3)] * len(far))
    lexicon = Lexicon(4)
    lexicon.load_state_dict(fit_lexicon(known, calibration_rows, 4))
    none, _, second, third = scores(lexicon, LabelledExamples(far[:1], [2])).squeeze(0).tolist()
    assert second == pytest.approx(third, abs=0.3)
    assert min(second, third) > none + 1
