"""Encoded rows and the batches made of them. Which rows make up global batch n is a pure function of the seed,
whatever the world size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from alignx_ds.data.encode import Batch, Example


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of one accumulation step.

    `experts` [B] is the expert that each row belongs to. `lm_scale` turns this part's summed NLL into its share of
    the global mean over answer tokens, given that DeepSpeed averages over ranks and accumulation steps.
    """

    batch: Batch
    experts: Tensor
    lm_scale: float
    examples: tuple[Example, ...] = ()  # what the batch was made of,
    numbers: tuple[int, ...] = ()  # and which of all rows they are


@dataclass(frozen=True)
class Rows:
    """Encoded rows with the expert that each belongs to."""

    examples: list[Example]
    experts: list[int]


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
