"""Steering: the vector by hand, its place, and what the study says of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import base_model

from alignx_ds.data.encode import Example
from alignx_ds.study import steering
from alignx_ds.study.studied_run import StudiedRun

Study = Callable[[str], dict[str, Any]]


def test_means_are_over_all_tokens_of_prompts_of_any_length(studied_run: StudiedRun) -> None:
    model = studied_run.base_model()
    prompts = [Example((5, 6, 7, 8), 4), Example((9, 10), 2)]
    found = steering.means(model, studied_run, prompts)
    for layer, mean in found.items():
        with torch.no_grad():
            states = [model(torch.tensor([p.ids]), output_hidden_states=True).hidden_states for p in prompts]
        if layer + 1 < len(states[0]) - 1:  # the last state is behind the final norm
            expected = torch.cat([hidden[layer + 1][0] for hidden in states]).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_a_vector_moves_the_layer_s_output_and_is_taken_away_again() -> None:
    model, ids = base_model(), torch.tensor([[5, 6, 7]])
    vector = torch.linspace(-1, 1, model.config.hidden_size)
    entering: list[torch.Tensor] = []  # the second layer
    model.model.layers[1].register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        model(ids)
        with steering.steered(model.model.layers[0], vector):
            model(ids)
        model(ids)
    before, during, after = entering
    torch.testing.assert_close(during, before + vector)
    assert torch.equal(after, before)


def test_the_best_is_chosen_by_the_own_and_the_other_axes() -> None:
    curve = [{"a": 50.0, "b": 90.0, "c": 70.0}, {"a": 100.0, "b": 20.0, "c": 0.0}]
    content = {"strengths": [1.0, 2.0], "steered": {"a": {"3": curve}}}
    assert steering.best(content, "a") == ("3", 1.0, curve[0])
    assert steering.others(curve[0], "a") == pytest.approx(80)


def test_a_run_s_study_has_every_axis_layer_and_strength(study: Study, studied_run: StudiedRun) -> None:
    content = study("steering")
    assert content["steered"].keys() == set(studied_run.scored_axes)
    for curves in content["steered"].values():
        assert all(len(curve) == len(content["strengths"]) for curve in curves.values())
    assert content["base"] == pytest.approx(studied_run.scores(studied_run.base_model()))
