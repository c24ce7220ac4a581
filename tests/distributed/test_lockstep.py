"""Generation with experts spread over ranks: each has prompts of its own, and says what one process says."""

from __future__ import annotations

import pytest
from problems import SPOKEN, WALKS, mixture, spoken
from worlds import Runs


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize(("world", "ep_size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_rank_says_what_one_process_says(runs: Runs, world: int, ep_size: int, walk: str) -> None:
    """Through plain `generate`: a rank that is done early has to go on for the others."""
    model = mixture().eval()
    expected = [spoken(model, rows, walk) for rows in SPOKEN[:world]]
    assert [part[f"{walk} ep{ep_size}"] for part in runs.of(world, "lockstep")] == expected


def test_the_ranks_are_done_at_different_steps() -> None:
    model = mixture().eval()
    lengths = [max(map(len, spoken(model, rows, "greedy"))) for rows in SPOKEN]
    assert len(set(lengths)) >= 3, lengths
    assert len({len(rows) for rows in SPOKEN}) == len({max(map(len, rows)) for rows in SPOKEN}) == len(SPOKEN)
