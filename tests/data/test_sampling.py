"""Global batches: every row once per epoch, and the same batches for any number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as torch_dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from alignx_ds.data.batches import IGNORED, MicroBatch
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.sampling import global_batches, share
from alignx_ds.runtime import distributed
from alignx_ds.training.engine import Plan
from alignx_ds.training.loop import micro_batches

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 5)


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is one of many ranks; anything but communication works."""
    torch_dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def plan(batch: int, accumulation: int, steps: int) -> Plan:
    return Plan(1e-3, batch, accumulation, steps, warmup_steps=0, weight_decay=0.0, clip=1.0, bf16=False)


def rows(count: int) -> LabelledExamples:
    """Row n has the prompt [n] and 1 + n modulo 5 answer tokens, and belongs to expert n modulo 4."""
    return LabelledExamples([Example((n, *[1] * (1 + n % 5)), 1) for n in range(count)], [n % 4 for n in range(count)])


@given(SIZES, SIZES, SEEDS)
def test_every_row_is_seen_once_before_any_is_seen_again(count: int, batch: int, seed: int) -> None:
    steps = 3 * count // batch + 2
    batches = list(global_batches(count, batch, steps, seed))
    assert [len(b) for b in batches] == [batch] * steps
    order = list(itertools.chain(*batches))
    for start in range(0, len(order), count):
        epoch = order[start : start + count]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < count or sorted(epoch) == list(range(count))


@given(SIZES, SIZES, SEEDS, st.integers(1, 8))
def test_the_batches_do_not_depend_on_the_number_of_steps(count: int, batch: int, seed: int, steps: int) -> None:
    """So a run that is resumed from a checkpoint trains on the same rows as one that was never interrupted."""
    assert list(global_batches(count, batch, 9, seed))[:steps] == list(global_batches(count, batch, steps, seed))


def test_epochs_and_seeds_have_their_own_order() -> None:
    first, second = global_batches(50, 50, 2, seed=0)
    (other,) = global_batches(50, 50, 1, seed=1)
    assert first != second
    assert first != other
    assert first != list(range(50))


@given(st.integers(1, 8), st.integers(1, 8), SEEDS)
def test_the_ranks_shares_make_up_the_global_batch(world_size: int, per_rank: int, seed: int) -> None:
    (batch,) = global_batches(100, world_size * per_rank, 1, seed)
    shares = [share(batch, rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*shares)) == batch
    assert {len(s) for s in shares} == {per_rank}


def test_a_batch_that_does_not_divide_is_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        share([1, 2, 3], 0, 2)


def seen(world_size: int, accumulation: int) -> list[list[MicroBatch]]:
    """By optimizer step: the micro batches of all ranks, in rank order."""
    by_rank = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            by_rank.append(list(micro_batches(rows(30), plan(8, accumulation, steps=5), pad_id=0, seed=2)))
    return [list(itertools.chain(*parts)) for parts in zip(*by_rank, strict=True)]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (8, 1)])
def test_a_step_sees_the_same_rows_at_any_world_size(world_size: int, accumulation: int) -> None:
    for parts, expected in zip(seen(world_size, accumulation), global_batches(30, 8, 5, seed=2), strict=True):
        assert len(parts) == world_size * accumulation
        found = [(int(r[0]), int(e)) for part in parts for r, e in zip(part.batch.input_ids, part.experts, strict=True)]
        assert found == [(n, n % 4) for n in expected]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_every_answer_token_of_a_step_weighs_the_same(world_size: int, accumulation: int) -> None:
    """DeepSpeed averages over ranks and accumulation steps; with `lm_scale` that is the mean over answer tokens."""
    for parts in seen(world_size, accumulation):
        tokens = [int((part.batch.labels != IGNORED).sum()) for part in parts]
        averaged = sum(part.lm_scale * n for part, n in zip(parts, tokens, strict=True)) / len(parts)
        assert averaged == pytest.approx(1.0)
        assert len({part.lm_scale for part in parts}) == 1


@settings(deadline=None)
@given(st.lists(st.integers()), st.integers(1, 6))
def test_interleave_undoes_rank_share(items: list[int], world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            shares.append(distributed.rank_share(items))
    assert distributed.interleave(shares) == items
    assert Counter(n for s in shares for n in s) == Counter(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
