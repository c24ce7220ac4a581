"""How the next tokens are chosen: by each row's own settings and its own random numbers."""

from __future__ import annotations

from random import Random

import pytest
import torch

from alignx_ds.evaluation.sampling import Sampling, choose

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def drawn(sampling: Sampling, count: int = 4000) -> list[float]:
    """The share of each token."""
    logits, draws = LOGITS.expand(count, -1), sampling.draws(0)
    tokens = [one.token for one in choose(logits, [(sampling, draws)] * count)]
    return [tokens.count(token) / count for token in range(4)]


def test_a_temperature_of_zero_takes_the_likeliest() -> None:
    assert drawn(Sampling(0.0), 3) == [1, 0, 0, 0]


def test_tokens_are_drawn_by_their_probability() -> None:
    assert drawn(Sampling(1.0, seed=1)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert drawn(Sampling(0.5, seed=1)) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    shares = drawn(Sampling(1.0, top_p, seed=2))
    assert all(shares[:kept]) and not any(shares[kept:])


def test_a_row_s_draws_do_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    one = Sampling(1.0, 0.9, seed=5)
    alone = choose(logits[2:3], [(one, one.draws(0))])
    others = [Sampling(), Sampling(0.0), one, Sampling(0.3, 0.2), Sampling(seed=5), Sampling(2.0)]
    assert choose(logits, [(sampling, sampling.draws(0)) for sampling in others])[2] == alone[0]


def test_a_seed_repeats_its_draws_and_its_answers_differ() -> None:
    again = [Sampling(seed=7).draws(choice).random() for choice in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert Sampling().draws(0).random() != Sampling().draws(0).random()


def test_log_probabilities_are_the_model_s_own() -> None:
    """Before the temperature, for the rows alone that ask for them, each with as many as it wants."""
    settings = [Sampling(0.0), Sampling(0.0, top_logprobs=0), Sampling(0.5, seed=1, top_logprobs=3)]
    bare, own, three = choose(LOGITS.expand(3, -1), [(sampling, Random(1)) for sampling in settings])
    assert bare.logprob is None and not bare.top
    assert own.logprob == pytest.approx(float(LOGITS[0])) and not own.top
    assert three.logprob == pytest.approx(float(LOGITS[three.token]))
    assert [token for token, _ in three.top] == [0, 1, 2]
    assert [logprob for _, logprob in three.top] == pytest.approx(LOGITS[:3].tolist())
