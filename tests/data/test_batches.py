"""Batches: padding on either side, and packed rows that give a model the same logits as each row by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCABULARY, base_model
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.data.batches import IGNORED, Batch, MicroBatch, Side, collate, pack, pad
from alignx_ds.data.encode import Example
from alignx_ds.training.losses import language_loss

PAD = 0
UNUSED = 999  # no token id of EXAMPLES
SHAPES = [(3, 4), (1, 1), (5, 6), (2, 3), (4, 1), (1, 2), (7, 5), (2, 0)]  # tokens of prompt and answer
LENGTHS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=14)
EXAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.lists(st.integers(0, 50), max_size=6)),
    min_size=1,
    max_size=5,
)


def rows(shapes: list[tuple[int, int]], seed: int = 0) -> list[Example]:
    """Of random tokens, so that no two are alike."""
    source = torch.Generator().manual_seed(seed)
    return [
        Example(tuple(torch.randint(1, VOCABULARY, (prompt + answer,), generator=source).tolist()), prompt)
        for prompt, answer in shapes
    ]


def unpacked(batch: Batch) -> list[list[tuple[Example, int, int]]]:
    """By line: its rows with line number and start, as the position ids separate them."""
    assert batch.position_ids is not None
    lines: list[list[tuple[Example, int, int]]] = []
    for i, (ids, attended, positions) in enumerate(
        zip(batch.input_ids, batch.attention_mask, batch.position_ids, strict=True)
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        line = []
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            assert attended[start:end].unique().numel() == 1, "padding is not part of a row"
            if attended[start]:
                prompt = int(batch.prompt_mask[i, start:end].sum())
                line.append((Example(tuple(ids[start:end].tolist()), prompt), i, start))
        lines.append(line)
    return lines


@given(LENGTHS)
@example([(1, 0)])
@example([(2, 2), (2, 2), (4, 0)])
def test_every_row_is_in_one_line_as_wide_as_the_longest_row(shapes: list[tuple[int, int]]) -> None:
    examples = rows(shapes)
    batch = pack(examples, PAD)
    found = [row for line in unpacked(batch) for row, _, _ in line]
    assert sorted(found, key=str) == sorted(examples, key=str)
    assert batch.input_ids.shape[1] == max(len(e.ids) for e in examples)
    assert int(batch.attention_mask.sum()) == sum(len(e.ids) for e in examples)
    assert batch.input_ids[batch.attention_mask == 0].eq(PAD).all()


@given(LENGTHS, st.integers(1, 9), st.integers(0, 30))
def test_lines_are_padded_to_a_multiple_within_the_limit(
    shapes: list[tuple[int, int]], multiple: int, limit: int
) -> None:
    examples = rows(shapes)
    batch = pack(examples, PAD, multiple, limit)
    longest, width = max(len(e.ids) for e in examples), batch.input_ids.shape[1]
    assert width >= longest and width - longest < multiple
    assert width % multiple == 0 or width in (limit, longest)
    assert width <= max(limit, longest)
    assert sorted((row for line in unpacked(batch) for row, _, _ in line), key=str) == sorted(examples, key=str)


@given(LENGTHS)
def test_a_new_line_starts_only_when_no_other_has_room(shapes: list[tuple[int, int]]) -> None:
    """First-fit decreasing, computed independently from the lengths."""
    longest_first = sorted((prompt + answer for prompt, answer in shapes), reverse=True)
    filled: list[list[int]] = []
    for length in longest_first:
        line = next((line for line in filled if sum(line) + length <= longest_first[0]), None)
        if line is None:
            filled.append([length])
        else:
            line.append(length)
    lines = unpacked(pack(rows(shapes), PAD))
    assert [[len(row.ids) for row, _, _ in line] for line in lines] == filled


@given(LENGTHS)
def test_the_labels_of_packed_rows_are_their_answers(shapes: list[tuple[int, int]]) -> None:
    batch = pack(rows(shapes), PAD)
    for line in unpacked(batch):
        for row, i, start in line:
            labels = batch.labels[i, start : start + len(row.ids)].tolist()
            assert labels == [IGNORED] * row.prompt_length + list(row.ids[row.prompt_length :])
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()


def test_a_row_without_a_prompt_cannot_be_packed() -> None:
    with pytest.raises(AssertionError):
        pack([Example((1, 2), 0)], PAD)


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_no_packed_row_attends_to_another(family: str) -> None:
    """In every architecture, sliding windows shorter than a row included."""
    model, examples = base_model(family=family), rows(SHAPES)
    batch = pack(examples, PAD)
    assert len(batch.input_ids) < len(examples)
    packed = logits(model, batch)
    for line in unpacked(batch):
        for row, i, start in line:
            alone = logits(model, collate([row], PAD))[0]
            torch.testing.assert_close(packed[i, start : start + len(row.ids)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_those_of_the_padded_batch(family: str) -> None:
    examples = rows(SHAPES, seed=1)
    found = []
    for batch in (pack(examples, PAD), collate(examples, PAD)):
        model = base_model(family=family).train()
        loss = language_loss(
            model, MicroBatch(batch, torch.zeros(len(examples)), torch.ones(len(examples), 1), 0.25)
        ).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (packed, gradients), (padded, expected) = found
    torch.testing.assert_close(packed, padded)
    assert padded > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def made(pairs: list[tuple[list[int], list[int]]]) -> list[Example]:
    return [Example((*prompt, *answer), len(prompt)) for prompt, answer in pairs]


@given(EXAMPLES, st.sampled_from(["left", "right"]))
def test_collate_keeps_every_token_in_its_place(pairs: list[tuple[list[int], list[int]]], side: Side) -> None:
    """Without the padding, a line is the prompt and the answer."""
    batch = collate(made(pairs), UNUSED, side)
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    assert batch.input_ids.shape == (len(pairs), width)
    for i, (prompt, answer) in enumerate(pairs):
        ids, attended = batch.input_ids[i], batch.attention_mask[i] == 1
        assert ids[attended].tolist() == [*prompt, *answer]
        assert ids[~attended].tolist() == [UNUSED] * (width - len(prompt) - len(answer))
        assert ids[batch.prompt_mask[i] == 1].tolist() == prompt
        assert batch.labels[i][batch.labels[i] != IGNORED].tolist() == answer
        assert not (batch.labels[i] != IGNORED)[~attended | (batch.prompt_mask[i] == 1)].any()


@given(EXAMPLES)
def test_the_padding_is_on_the_side_that_was_asked_for(pairs: list[tuple[list[int], list[int]]]) -> None:
    left, right = (collate(made(pairs), UNUSED, side) for side in ("left", "right"))
    assert (left.attention_mask.diff(dim=1) >= 0).all()  # 0 … 0 1 … 1
    assert (right.attention_mask.diff(dim=1) <= 0).all()  # 1 … 1 0 … 0
    for name in ("input_ids", "attention_mask", "prompt_mask", "labels"):
        for i, mask in enumerate(left.attention_mask):
            shift = int(mask.sum())  # rolls the padding from the front to the back
            assert torch.equal(getattr(left, name)[i].roll(shift), getattr(right, name)[i])


@given(EXAMPLES, st.integers(1, 8))
def test_padding_to_a_multiple_only_widens(pairs: list[tuple[list[int], list[int]]], multiple: int) -> None:
    batch = collate(made(pairs), UNUSED, "left")
    width = batch.input_ids.shape[1]
    ids, mask = pad([[*prompt, *answer] for prompt, answer in pairs], UNUSED, "left", multiple)
    assert ids.shape[1] % multiple == 0 and width <= ids.shape[1] < width + multiple
    assert torch.equal(ids[:, -width:], batch.input_ids) and bool((ids[:, :-width] == UNUSED).all())
    assert torch.equal(mask[:, -width:], batch.attention_mask) and not mask[:, :-width].any()
