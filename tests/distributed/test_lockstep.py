"""Generation with experts spread over ranks: each rank generates from its own prompts what one process would."""

from __future__ import annotations

import pytest
from problems import DECODING, PROMPT_ROWS, generated, mixture
from worlds import Runs


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize(("world", "ep_size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_rank_generates_what_one_process_generates(runs: Runs, world: int, ep_size: int, decoding: str) -> None:
    """Through plain `generate`: a rank that finishes early has to keep taking part in the collectives."""
    model = mixture().eval()
    expected = [generated(model, rows, decoding) for rows in PROMPT_ROWS[:world]]
    assert [part[f"{decoding} ep{ep_size}"] for part in runs.of(world, "lockstep")] == expected


def test_the_ranks_finish_at_different_steps() -> None:
    model = mixture().eval()
    lengths = [max(map(len, generated(model, rows, "greedy"))) for rows in PROMPT_ROWS]
    assert len(set(lengths)) >= 3, lengths
    assert (
        len({len(rows) for rows in PROMPT_ROWS})
        == len({max(map(len, rows)) for rows in PROMPT_ROWS})
        == len(PROMPT_ROWS)
    )
