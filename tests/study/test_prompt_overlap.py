"""The overlap of harmful and harmless prompts: cases worked by hand, and the states of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import generator

from alignx_ds.study.prompt_overlap import compared, last_states, leading_modes, mode_overlap
from alignx_ds.study.studied_run import SYSTEMS, StudiedRun

Study = Callable[[str], dict[str, Any]]


def along(*entries: tuple[int, float]) -> torch.Tensor:
    """Two states in 4 dimensions for each (direction, length): ± length along it, around a common mean."""
    made = torch.ones(2 * len(entries), 4)
    for n, (direction, length) in enumerate(entries):
        made[2 * n, direction] += length
        made[2 * n + 1, direction] -= length
    return made


def test_the_fewest_directions_that_hold_nine_tenths() -> None:
    """Squared lengths of 81, 16 and 3 in 100: the first holds 0.81, the first two 0.97."""
    modes = leading_modes(along((0, 9.0), (1, 4.0), (2, 3**0.5)))
    assert modes.shape == (4, 2)
    assert modes.abs().numpy() == pytest.approx(torch.eye(4)[:, :2].numpy(), abs=1e-6)
    assert leading_modes(along((0, 10.0), (1, 1.0))).shape == (4, 1)


def test_the_overlap_of_two_sets_by_hand() -> None:
    """Of {e0, e1} with {e1}, {e2}, {e1, e2}: 1, 0, 1/2; at random the larger number of directions in 4."""
    plane = along((0, 1.0), (1, 1.0))
    assert mode_overlap(plane, along((1, 5.0))) == (pytest.approx(1), 2 / 4)
    assert mode_overlap(plane, along((2, 5.0))) == (pytest.approx(0), 2 / 4)
    assert mode_overlap(plane, along((1, 1.0), (2, 1.0))) == (pytest.approx(1 / 2), 2 / 4)


def test_random_sets_overlap_as_is_said_and_halves_of_one_set_more_than_two_sets_apart() -> None:
    source = generator(0)
    spread = torch.randn(4, 64, generator=source), torch.randn(4, 64, generator=source)
    first, second = (torch.randn(400, 4, generator=source) @ own for own in spread)
    found = compared(first, second)
    assert found["halves"] > 0.95 and found["overlap"] < 0.2
    noise = [torch.randn(2000, 64, generator=source) for _ in range(2)]
    overlap, random = mode_overlap(*noise)
    assert overlap == pytest.approx(random, rel=0.05)


def test_a_run_s_states_are_those_of_its_last_prompt_tokens(study: Study, studied_run: StudiedRun) -> None:
    model, examples = studied_run.system("base"), studied_run.data.routed.examples[:5]
    states = last_states(model, studied_run, examples)
    example = examples[3]
    with torch.no_grad():
        alone = model(
            input_ids=torch.tensor([example.ids[: example.prompt_length]]), output_hidden_states=True
        ).hidden_states
    assert states[1][3].numpy() == pytest.approx(alone[2][0, -1].float().numpy(), abs=1e-4)
    content = study("overlap")["prompts"]
    assert tuple(content["systems"]) == SYSTEMS
    for by_layer in content["systems"].values():
        assert list(by_layer) == [str(layer) for layer in range(len(by_layer))]
        assert all(0 <= value <= 1 + 1e-9 for own in by_layer.values() for value in own.values())
