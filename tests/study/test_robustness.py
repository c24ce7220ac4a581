"""Robustness: what counts as a refusal lost, which layers are probed, and what the study says of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import cli
from alignx_ds.data.world.language import REFUSAL
from alignx_ds.evaluation.likelihood import likelihoods
from alignx_ds.study import robustness
from alignx_ds.study.robustness import Probe
from alignx_ds.study.studied_run import StudiedRun

Study = Callable[[str], dict[str, Any]]


def test_only_prompts_that_were_refused_can_lose_their_refusal() -> None:
    refused, falls = [True, True, True, True, False, False], [True, False, False, False, True, True]
    assert robustness.of_refused(refused, falls) == 25
    assert robustness.of_refused([False, False], [True, True]) is None


def test_the_first_and_the_last_layer_of_a_deep_model_are_probed() -> None:
    assert robustness._layers(6) == [0, 1, 2, 3, 4, 5]
    assert robustness._layers(29) == [0, 4, 8, 12, 16, 20, 24, 28]


def test_the_weakest_layer_is_the_first_with_the_most() -> None:
    points = {"0": 10.0, "1": 40.0, "2": 40.0}
    found = {"layers": {layer: [{"lost": 99.0}, {"lost": lost}] for layer, lost in points.items()}}
    assert robustness.weakest(found, 1, "lost") == "1"


def test_without_noise_the_answers_and_their_nll_are_the_model_s_own(studied_run: StudiedRun) -> None:
    probe, model = Probe.of(studied_run), studied_run.fine_tuned("harmless")
    said = [REFUSAL if n % 2 else "no" for n in range(len(probe.rows))]
    examples = probe.encoded(said)
    known = likelihoods(model, examples, studied_run.pad_id, studied_run.batch)
    expected = -sum(one.log_probability for one in known) / sum(one.tokens for one in known)
    noise = probe.noise
    assert probe.nll(model, examples, 2, noise, 0.0) == pytest.approx(expected)
    assert probe.nll(model, examples, 2, noise, 1.0) != pytest.approx(expected, rel=0.01)
    assert probe.said(model, 0, noise, 0.0) == probe.said(model, 3, noise, 0.0)


def test_noise_is_the_same_for_every_system_and_every_time(studied_run: StudiedRun) -> None:
    one, two = Probe.of(studied_run), Probe.of(studied_run)
    assert one.noise.equal(two.noise) and len(one.noise) == len(one.rows)
    assert all(row.harmful for row in one.rows) and one.axis == "harmless"


def test_a_run_s_study_has_every_system_layer_and_strength(study: Study, studied_run: StudiedRun) -> None:
    content = study("robustness")
    assert list(content["systems"]) == ["base", *studied_run.axes, "sequential", "mixed", "alignx"]
    for found in content["systems"].values():
        for kind in ("random", "gradient"):
            layers = found[kind]["layers"]
            assert list(layers) == [str(layer) for layer in content["layers"]]
            assert all(len(points) == len(content["strengths"]) for points in layers.values())
            assert max(points[-1]["nll"] for points in layers.values()) > found["nll"]


def test_a_run_whose_judge_knows_no_harm_is_refused(
    without_a_judge_of_harm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", "robustness", str(without_a_judge_of_harm)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignx-ds: error: RUN_DIR: got ") and "safety or offline_safety" in line
    assert not (without_a_judge_of_harm / "study").exists()
