"""Which rows make up each global batch: a pure function of the seed, whatever the world size."""

from __future__ import annotations

import random
from collections.abc import Iterator


def global_batches(rows: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` lists of `batch` row numbers; every row is seen once before any is seen again."""
    assert rows > 0 and batch > 0
    queue: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(queue) < batch:
            order = list(range(rows))
            random.Random(f"{seed} {epoch}").shuffle(order)
            queue, epoch = queue + order, epoch + 1
        yield queue[:batch]
        queue = queue[batch:]


def share(items: list[int], rank: int, world_size: int) -> list[int]:
    """The rank's contiguous part of a global batch; the sizes must divide."""
    assert len(items) % world_size == 0
    size = len(items) // world_size
    return items[rank * size : (rank + 1) * size]
