"""Label sets: from the names that a row needs to multi-hot tensors, and their cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.labels import label_set, multi_hot, named_set, one_by_one, set_nll
from alignx_ds.data.rows import Row
from alignx_ds.errors import DataError

NAMES = ["generalist", "helpful", "harmless", "honest"]


@pytest.mark.parametrize(
    ("needs", "expected"),
    [((), (2,)), (("honest", "helpful"), (1, 3)), (("generalist",), (0,)), (("generalist", "helpful"), (1,))],
)
def test_a_row_s_label_set(needs: tuple[str, ...], expected: tuple[int, ...]) -> None:
    assert label_set(Row("hello", "", needs=needs), NAMES, owner=2) == expected


def test_an_unknown_need_names_its_row() -> None:
    with pytest.raises(
        DataError, match=r"rows\.json, row 3: the label 'kind' is no expert; there are generalist, helpful"
    ):
        named_set(["helpful", "kind"], NAMES, "rows.json, row 3")


def test_multi_hot_has_the_generalist_where_nothing_is_needed() -> None:
    assert multi_hot([(1, 3), (0,), (2,)], 4).tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_rows_need_their_owner_unless_they_say_otherwise() -> None:
    rows = LabelledExamples([Example((1, 2), 1)] * 2, [1, 3])
    rows.add([Example((3, 4), 1)] * 2, 2, [(1, 2), (0,)])
    rows.add([Example((5, 6), 1)], 0)
    assert rows.needs == [(1,), (3,), (1, 2), (0,), (0,)]
    assert rows.experts == [1, 3, 2, 2, 0]
    assert rows.width == 4
    assert rows.digest != LabelledExamples(rows.examples, rows.experts).digest


def test_the_cross_entropy_of_sets() -> None:
    """Of one-hot sets it is that of the labels to the last bit, gradient too; of two experts, the mean of theirs."""
    logits = (3 * torch.randn(257, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.arange(257) % 4
    found, known = set_nll(logits.log_softmax(-1), functional.one_hot(labels, 4).float()), None
    known = functional.nll_loss(logits.log_softmax(-1), labels)
    assert torch.equal(found, known)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (found, known)))
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    both = set_nll(log_p, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    assert float(both) == pytest.approx(-0.5 * float(log_p[0, 1] + log_p[0, 2]))
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert float(set_nll(impossible, torch.tensor([[1.0, 0.0]]))) == 0


def test_one_label_a_row_for_classifiers() -> None:
    assert one_by_one([(2,), (0,)]) == ([0, 1], [2, 0], None)
    assert one_by_one([(2,), (1, 3)]) == ([0, 1, 1], [2, 1, 3], [1.0, 0.5, 0.5])
    assert one_by_one([]) == ([], [], None)
