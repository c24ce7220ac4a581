"""Examples to tensors: padded or packed batches, with labels on the answers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from alignx_ds.data.encode import Example

IGNORED = -100  # the label that cross-entropy leaves out
Side = Literal["left", "right"]  # of the padding


@dataclass(frozen=True)
class Batch:
    """All [B, T] int64. Labels are IGNORED outside the answers. Packed rows have `position_ids` from 0 for each row.

    `owners` has the number of the example that each token is of, among those of the batch; 0 in the padding.
    `predicting` [N] int64 are the places in [B T] of the tokens whose next one has a label. They are found before the
    batch is moved to a device, where the host would have to wait for their number.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_mask: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    owners: Tensor | None = None
    predicting: Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.predicting is None:
            object.__setattr__(self, "predicting", _predicting(self.labels))

    @property
    def targets(self) -> Tensor:
        """[N] int64: the labels of the tokens after those at `predicting`."""
        return self.labels.flatten()[self.predicting + 1]

    def in_one_line(self) -> Batch:
        """Packed rows as [1, B T]. A row's first token has no label, so no line's last token predicts one."""
        assert self.position_ids is not None
        return replace(self._each(lambda tensor: tensor.reshape(1, -1)), predicting=self.predicting)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: t if t is None else change(t) for name, t in tensors.items()}
        return Batch(**changed)

    def filled(self) -> Batch:
        """The same, after labels have been written into it."""
        return replace(self, predicting=_predicting(self.labels))


def _predicting(labels: Tensor) -> Tensor:
    labelled = functional.pad(labels[:, 1:] != IGNORED, (0, 1))  # a line's last token predicts none
    return labelled.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of one accumulation step.

    `experts` [B] int64 holds the expert that owns each row, `needs` [B, E] fp32 is 1 for those that its prompt needs:
    for the generalist, expert 0, exactly where it needs no axis. `lm_scale` turns this part's summed NLL into its
    share of the global mean over answer tokens, given that DeepSpeed averages over ranks and accumulation steps.
    `gate_weights` [B] fp32 is what each row counts when the gate is fitted, 1 if it is None.
    """

    batch: Batch
    experts: Tensor
    needs: Tensor
    lm_scale: float
    gate_weights: Tensor | None = field(default=None, kw_only=True)
    examples: tuple[Example, ...] = ()  # the rows of the batch, then their other answers, if they have any, and
    numbers: tuple[int, ...] = ()  # the indices of these rows among all training rows


def collate(examples: list[Example], pad_id: int, side: Side = "right", multiple: int = 1) -> Batch:
    """One example a line, padded on the left or the right to the longest, or to a `multiple` above it."""
    assert examples
    width = -(-max(len(e.ids) for e in examples) // multiple) * multiple
    batch = _empty_batch(len(examples), width, pad_id)
    for line, example in enumerate(examples):
        _write(batch, line, width - len(example.ids) if side == "left" else 0, example, line)
    return batch.filled()


def pad(rows: Sequence[list[int]], pad_id: int, side: Side, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids without labels, padded as by `collate`: (ids, attention mask), both [B, T] int64."""
    batch = collate([Example(tuple(row), len(row)) for row in rows], pad_id, side, multiple)
    return batch.input_ids, batch.attention_mask


def pack(examples: list[Example], pad_id: int, multiple: int = 1, limit: int = 0) -> Batch:
    """Several examples a line; no example attends to another.

    Lines are as wide as the longest example, or a `multiple` above it, but then at most `limit` wide.

    Position ids start at 0 for each example, and for the padding. transformers masks attention between the examples
    by these starts, if the model is called without an attention mask.
    """
    assert all(e.prompt_length for e in examples), "a row's first token can't be predicted, so it has no label"
    longest = max(len(e.ids) for e in examples)
    width = max(longest, min(-(-longest // multiple) * multiple, limit))
    lines = _first_fit_decreasing(examples, width)
    batch = _empty_batch(len(lines), width, pad_id)
    positions = torch.zeros_like(batch.input_ids)
    for number, line in enumerate(lines):
        start = 0
        for owner in line:
            end = _write(batch, number, start, examples[owner], owner)
            positions[number, start:end] = torch.arange(end - start)
            start = end
        positions[number, start:] = torch.arange(width - start)
    return replace(batch, position_ids=positions).filled()


def _first_fit_decreasing(examples: list[Example], width: int) -> list[list[int]]:
    """The numbers of each line's examples: longest first, each goes into the first line with room for it."""
    lines: list[list[int]] = []
    free: list[int] = []  # by line
    for number in sorted(range(len(examples)), key=lambda n: -len(examples[n].ids)):
        length = len(examples[number].ids)
        line = next((i for i, columns in enumerate(free) if columns >= length), len(lines))
        if line == len(lines):
            lines.append([])
            free.append(width)
        lines[line].append(number)
        free[line] -= length
    return lines


def _empty_batch(lines: int, width: int, pad_id: int) -> Batch:
    ids = torch.full((lines, width), pad_id)
    ignored, owners = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    return Batch(ids, torch.zeros_like(ids), torch.zeros_like(ids), ignored, owners=owners)


def _write(batch: Batch, line: int, start: int, example: Example, owner: int) -> int:
    """Fill a line's columns from `start` on; returns the column behind the example."""
    answer, end = start + example.prompt_length, start + len(example.ids)
    assert batch.owners is not None
    batch.owners[line, start:end] = owner
    batch.input_ids[line, start:end] = torch.tensor(example.ids)
    batch.attention_mask[line, start:end] = 1
    batch.prompt_mask[line, start:answer] = 1
    for first, last in ((answer, end), *((start + a, start + b) for a, b in example.earlier)):
        batch.labels[line, first:last] = batch.input_ids[line, first:last]
    return end
