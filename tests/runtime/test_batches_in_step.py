"""All ranks take part in the same number of batches."""

from __future__ import annotations

import pytest

from alignx_ds.runtime import distributed


@pytest.mark.parametrize(("items", "size", "rounds"), [(7, 2, 2), (8, 4, 1), (9, 2, 3), (1, 3, 1), (0, 3, 0)])
def test_every_rank_has_as_many_batches_and_each_item_once(
    monkeypatch: pytest.MonkeyPatch, items: int, size: int, rounds: int
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        own = list(range(items))[rank::2]
        batches = list(distributed.lockstep(own, size, items, spare=0))
        assert len(batches) == rounds
        assert all(chosen for chosen, _ in batches)
        seen += [item for chosen, wanted in batches if wanted for item in chosen]
    assert sorted(seen) == list(range(items))
