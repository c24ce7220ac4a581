"""The lexical score against scikit-learn's TF-IDF, and its independence of padding and neighbours."""

from __future__ import annotations

import pytest
import torch
from tiny_models import generator

from alignx_ds.mocae.lexical import BUCKETS, Lexicon, bucket_counts, ngrams


def random_lexicon(experts: int = 3) -> Lexicon:
    lexicon, source = Lexicon(experts), generator(1)
    lexicon.rarity.copy_(1 + torch.rand(BUCKETS, generator=source))
    lexicon.weights.copy_(torch.randn(experts, BUCKETS, generator=source))
    lexicon.bias.copy_(torch.randn(experts, generator=source))
    return lexicon


def test_tokens_and_pairs_of_neighbours_are_counted() -> None:
    ids = torch.tensor([[5, 7, 5, 7, 9]])
    counts = bucket_counts(ids, torch.ones_like(ids))
    assert counts.sum() == 5 + 4
    assert sorted(counts[counts > 0].tolist()) == [1, 1, 1, 2, 2, 2]  # 9, (7 5), (7 9) · 5, 7, (5 7)


def test_a_pair_knows_its_order() -> None:
    forth, back = (bucket_counts(torch.tensor([pair]), torch.ones(1, 2)) for pair in ([11, 12], [12, 11]))
    assert not torch.equal(forth, back)


def test_every_token_of_a_large_vocabulary_has_a_bucket_of_its_own() -> None:
    ids = torch.arange(BUCKETS).unsqueeze(1)  # prompts of one token: no pairs
    buckets, _ = ngrams(ids, torch.ones_like(ids))
    assert len(buckets.unique()) == BUCKETS


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_answers_count_for_nothing(side: str) -> None:
    lexicon, prompt = random_lexicon(), [3, 4, 5, 3]
    alone = lexicon(torch.tensor([prompt]), torch.ones(1, 4))
    other = [8, 8, 1]
    padded = torch.tensor([other + prompt if side == "left" else prompt + other])
    mask = torch.tensor([[0] * 3 + [1] * 4 if side == "left" else [1] * 4 + [0] * 3])
    torch.testing.assert_close(lexicon(padded, mask), alone)
    assert not torch.allclose(lexicon(padded, torch.ones(1, 7)), alone), "the mask must matter"


def test_a_row_s_score_does_not_depend_on_the_others() -> None:
    lexicon, ids = random_lexicon(), torch.randint(0, 50, (6, 9), generator=generator(2))
    together = lexicon(ids, torch.ones_like(ids))
    for row, score in zip(ids, together, strict=True):
        torch.testing.assert_close(lexicon(row[None], torch.ones(1, 9))[0], score)


def test_an_empty_prompt_has_the_bias() -> None:
    lexicon = random_lexicon()
    assert torch.equal(lexicon(torch.tensor([[4, 4]]), torch.zeros(1, 2))[0], lexicon.bias)
